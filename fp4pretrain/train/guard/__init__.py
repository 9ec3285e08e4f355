"""What a run does about NaN, Inf and loss spikes: updates are left out (``update``), ``decisions`` made,
and the run goes back to a checkpoint (``rollback``).

``hooks/guards`` brings them together; ``hooks/watchdog`` is for runs that hang.
"""
