"""The bridge: one process for each GPU of a node, child of the daemon, owner of an arena and of a communicator.

commands.py      the daemon's commands; replies.py the bridge's answers, frames.py the bytes of both
process.py       the process: its pipe, its threads, its end
service.py       what each command does
rendezvous.py    where the members of a communicator find one another; loads torch when it is first used
communicator.py  what the communicators of gloo.py and nccl.py share
"""
