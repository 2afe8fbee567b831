"""One push as a pure state machine: events in, instructions out; no socket, tensor or clock.

Read `events` for what a session hears, `instructions` for what it answers, `machine` for how it comes to that, and
`transitions` for which rule an event is given to.
"""
