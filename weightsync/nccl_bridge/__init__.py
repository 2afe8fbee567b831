"""The bridge: one process for each GPU of a node, child of the daemon, owner of an arena and of a communicator.

commands.py      what the daemon may ask, and its bytes
process.py       the process: its pipe, its threads, its end
service.py       what each command does
rendezvous.py    where the members of a communicator find one another
communicator.py  the communicator itself; loads torch when one is joined
"""
