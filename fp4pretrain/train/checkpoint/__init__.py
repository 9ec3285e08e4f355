"""Checkpoints: the state of a run as whole tensors, readable by any layout, verified before use.

    checkpoints/
      latest                      the name of the newest complete checkpoint
      step_00000100/
        rank_00000.safetensors    boxes of the whole tensors, by the rank that held them (files)
        rank_00001.safetensors
        run.json                  step, position in the data, skipped samples, what hooks remember,
                                  Adam's and the schedule's step; model, layout, lengths, fingerprint
        manifest.json             every file's size and SHA-256, where every tensor's boxes lie
      .step_00000200.partial/     a save under way, or one that was interrupted

A folder is written under its hidden name and renamed when every rank has written its part, and only
then named in ``latest``; what an interrupted save leaves is removed at the next start or save. So
all of ``step_*`` was complete once, and the manifest tells whether it still is. Nothing is pickled.
"""

from fp4pretrain.train.checkpoint.files import Damaged, Manifest, read_manifest, read_part
from fp4pretrain.train.checkpoint.loading import (
    Unusable,
    candidates,
    check_model,
    described,
    find,
    load,
    resume,
)
from fp4pretrain.train.checkpoint.saving import (
    LATEST,
    RUN,
    Keep,
    SaveError,
    Saving,
    remove_leftovers,
    save,
)
from fp4pretrain.train.checkpoint.state import fill_weights, restore_weights

__all__ = [
    "LATEST",
    "RUN",
    "Damaged",
    "Keep",
    "Manifest",
    "SaveError",
    "Saving",
    "Unusable",
    "candidates",
    "check_model",
    "described",
    "fill_weights",
    "find",
    "load",
    "read_manifest",
    "read_part",
    "remove_leftovers",
    "restore_weights",
    "resume",
    "save",
]
