"""The run config: every key a user can set, with its default and its check, in one place.

sections    the dataclasses that are Hydra's schema
composing   YAML and overrides -> ``RunConfig``, and the plan that it means
"""

from fp4pretrain.config.composing import completed, compose, plan_of, schema_keys
from fp4pretrain.config.sections import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LoggingConfig,
    ModelConfig,
    ObserveConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RunConfig,
    SpikeConfig,
    SweepConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RunConfig",
    "SpikeConfig",
    "SweepConfig",
    "TrainConfig",
    "WandbConfig",
    "completed",
    "compose",
    "plan_of",
    "schema_keys",
]
