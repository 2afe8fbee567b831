"""One push as a pure state machine: events in, instructions out; no socket, tensor or clock.

Read `events` for what a session hears, `instructions` for what it answers, `machine` for the rules in between and
`transitions` for the table of them.
"""
