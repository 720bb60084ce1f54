"""What other tools' recipes hold that this project doesn't have: named, so that messages can say what it is."""

_SPARSEML = "It is SparseML's: remove it."
_LLM_COMPRESSOR = "It is LLM Compressor's: remove it."
_ONE_SHOT = "It is LLM Compressor's; what prunes in one shot here is !ReconstructionModifier."

OTHERS = dict.fromkeys(
    (
        "ACDCPruningModifier",
        "AdaPruneModifier",
        "CyclicLearningRateModifier",
        "DistillationModifier",
        "GradualParamModifier",
        "LayerPruningModifier",
        "LayerThinningModifier",
        "LearningRateFinalModifier",
        "LegacyQuantizationModifier",
        "MovementPruningModifier",
        "OBSXPruningModifier",
        "PerLayerDistillationModifier",
        "PowerpropagationModifier",
        "PruningModifier",
        "QuantizationModifier",
        "RegularizerModifier",
        "RigLPruningModifier",
        "SetParamModifier",
        "StructuredPruningModifier",
        "TopKASTPruningModifier",
    ),
    _SPARSEML,
)
"""Modifiers that do something else, whatever known name theirs is near; what to do about each."""
OTHERS |= dict.fromkeys(
    (
        "AWQModifier",
        "AutoRoundModifier",
        "GPTQModifier",
        "LogarithmicEqualizationModifier",
        "OutputDistillationModifier",
        "QuIPModifier",
        "SmoothQuantModifier",
        "SpinQuantModifier",
    ),
    _LLM_COMPRESSOR,
)
OTHERS |= dict.fromkeys(("SparseGPTModifier", "WandaPruningModifier"), _ONE_SHOT)

THEIR_FIELDS = {
    "targets": "params",
    "ignore": "exclude",
    "start": "start_epoch",
    "end": "end_epoch",
    "update": "update_frequency",
    "sparsity": "final_sparsity",
    "update_scheduler": "inter_func",
    "mask_structure": "mask_type",
    "apply_globally": "global_sparsity",
    "percdamp": "damp",
    "dampening_frac": "damp",
    "block_size": "fisher_block_size",
}
"""How LLM Compressor calls fields that are here, too."""
