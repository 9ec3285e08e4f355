"""What a run does about NaN, Inf and loss spikes: the update held back, the decisions, the way back.

``hooks/guards`` brings them together; ``hooks/watchdog`` is for runs that hang.
"""
