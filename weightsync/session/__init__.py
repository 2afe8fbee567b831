"""One push as a pure state machine: events in, instructions out; no socket, tensor or clock.

`events` has the inputs and `instructions` the outputs. `machine` explains how one leads to the other, and `transitions`
says which rule handles which event.
"""
