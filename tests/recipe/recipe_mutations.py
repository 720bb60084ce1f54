"""Recipes as they are in the world, and ways to damage them."""

import random

MNIST = """\
# One-shot MNIST
pruning_modifiers:
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.0
    final_sparsity: 0.35
    start_epoch: 0
    end_epoch: 1
    update_frequency: 1
    mfac_options:
      num_grads: 512
      fisher_block_size: 2000
"""

IMAGENETTE = """\
<!-- Licensed under the Apache License -->
---
# Epochs -----
num_epochs: &num_epochs 3
init_lr: &lr 4e-4
start: &start 1.0
end: &end 2.0
frequency: &freq 1
init_sparsity: &init 0.35
num_grads: &grads 256
block: &block 2000
gpus: &gpus ["cuda:0"]

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: *num_epochs
  - !SetLearningRateModifier
    start_epoch: 0
    learning_rate: *lr

pruning_modifiers:
  - !MFACPruningModifier
    params: []
    init_sparsity: *init
    final_sparsity:
      0.90:
        - sections.1.0.conv.weight
        - sections.1.1.conv.weight
        - sections.2.0.conv.weight
      0.95:
        - sections.2.1.conv.weight
        - sections.3.0.conv.weight
        - sections.3.1.conv.weight
        - sections.3.2.conv.weight
      0.97: [sections.3.3.conv.weight, sections.3.4.conv.weight, sections.3.5.conv.weight, sections.4.0.conv.weight,
        sections.4.1.conv.weight]
    start_epoch: *start
    end_epoch: *end
    update_frequency: *freq
    num_grads: *grads
    fisher_block_size: *block
    available_gpus: *gpus

regularization_modifiers:
  - !SetWeightDecayModifier
    start_epoch: *end
    weight_decay: 0
---

# MobileNet on Imagenette

Reaches 88.6 %:

```yaml
pruning_modifiers:
```
"""

TUTORIAL = """\
pruning_modifiers:
    - !MFACPruningModifier
        params: __ALL_PRUNABLE__
        init_sparsity: 0.05
        final_sparsity: 0.85
        start_epoch: 1.0
        end_epoch: 61.0
        update_frequency: 4.0
        mfac_options:
            num_grads: {0.0: 256, 0.5: 512, 0.75: 1024, 0.83: 1400}
            fisher_block_size: 10000
            available_gpus: ["cuda:0"]
"""

TRANSFER = """\
# Epoch hyperparams
stabilization_epochs: 1
pruning_epochs: 9
finetuning_epochs: 5

# Learning rate hyperparams
init_lr: 1e-4
final_lr: 5e-5

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: eval(stabilization_epochs + pruning_epochs + finetuning_epochs)

pruning_modifiers:
  - !LearningRateFunctionModifier
    start_epoch: eval(stabilization_epochs)
    end_epoch: eval(stabilization_epochs + pruning_epochs + finetuning_epochs)
    lr_func: cosine
    init_lr: eval(init_lr)
    final_lr: eval(final_lr)
  - !GlobalMagnitudePruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.9
    start_epoch: eval(stabilization_epochs)
    end_epoch: eval(stabilization_epochs + pruning_epochs)
    update_frequency: 0.5
"""

SQUAD = """\
num_epochs: 30
batch_size: 8
modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: eval(num_epochs)}
  - !OBSPruningModifier  # oBERT
    params: ["re:encoder.layer.*.query.weight", "re:encoder.layer.*.key.weight"]
    init_sparsity: 0.7
    final_sparsity: 0.9
    start_epoch: 2
    end_epoch: 26
    update_frequency: 4
    mask_type: unstructured
    global_sparsity: True
    num_grads: 1024
    damp: 1e-7
    fisher_block_size: 50
    grad_sampler_kwargs:
      batch_size: eval(batch_size)
  - !LearningRateFunctionModifier:
    start_epoch: 0
    end_epoch: 30
    lr_func: cyclic_linear
    init_lr: 8e-5
    final_lr: 3e-5
    cycle_epochs: 4.0
"""

STAGED = """\
epochs: 4
lr: 0.01
__metadata__: {made_by: someone, tags: [a, b]}
pruning_stage:
  lr: eval(2 * base)
  base: 0.25
  recipe_metadata: {dict: {a: 1}}
  pruning_modifiers:
    - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}
    - MFACPruningModifier: {params: [a/kernel], mask_type: 2:4, damp: 1e-5}
finetuning_stage:
  training_modifiers:
    - !SetLearningRateModifier {learning_rate: eval(lr), start_epoch: 0}
"""

NESTED_DIALECT = TUTORIAL
FLAT_DIALECT = """\
pruning_modifiers:
  - !MFACPruningModifier
    params: ["re:.*conv.*"]
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 0
    end_epoch: 10
    update_frequency: 0.5
    num_grads: {0.0: 64, 0.5: 128}
    fisher_block_size: 2000
    available_gpus: ["cuda:0", "cuda:1"]
    mask_type: [1, 4]
"""
DEVICES_DIALECT = """\
pruning_modifiers:
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: __FROM_PARAM__
    final_sparsity: 0.8
    start_epoch: -1
    end_epoch: 10
    update_frequency: -1
    global_sparsity: false
    leave_enabled: True
    inter_func: cubic
    log_types: __ALL__
    use_gradient_buffering: null
    num_grads: 64
    num_pages: 1
    grads_device: cpu
    available_devices: ["cuda:0"]
"""

SEEDS = [MNIST, IMAGENETTE, TUTORIAL, TRANSFER, SQUAD, STAGED, FLAT_DIALECT, DEVICES_DIALECT]

SNIPPETS = [
    *"[]{}:,-!&*#|>'\"%@`?\t\n\r\0\\~<=.()+/ \u2028\x85\ufeff\ud800é",
    "---\n", "\n---\n", "...\n", "- ", "? ", ": ", "<<: ", "<<: *start\n", "!!python/object/apply:os.system [ls]",
    "!<tag:yaml.org,2002:str> x", "!!int 3", "!Tag", "!Tag:", " !Tag {a: 1.0}", "&a ", "*a", "*start", "&start ",
    "eval(", "eval(9**9**9)", "eval(1/0)", "eval(__import__('os'))", "eval(epochs",
    "eval(" + "(" * 300, "eval(-" + "-" * 400,
    "eval(num_epochs)", "eval(max(1, 2))", "eval(round(1, -99999999))", "eval((-1)**0.5)", "eval(lr.real)", "eval(\0)",
    "1" * 5000, "0x" + "f" * 300, "1e999", ".nan", ".inf", "2:4", "1_000", "[" * 200, "{a: " * 60, "- " * 60,
    "a: &x [*x]\n", "x: &x {a: *x}\n", "\"\\UFFFFFFFF\"", "\"\\ud800\"", "'",
    "%YAML 1.2\n---\n", "%TAG ! tag:x,2000:\n---\n",
    "a: &a0 [x,x,x,x]\nb: &a1 [*a0,*a0,*a0,*a0]\n", "# -----\n", "<!--", "-->", "\r\n", "\t- x\n", "    ", "  ",
    "modifiers: []\n", "x_modifiers:\n", "stage: {modifiers: [!A]}\n", "null", "~", "true",
    "? [a, b]\n: c\n", "|\n  x\n", ">-\n",
]  # fmt: skip


def mutate(rng: random.Random, text: str) -> str:
    """The text with a few of its parts inserted, deleted, replaced, repeated, or mixed with another recipe."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        text = rng.choice((_insert, _insert, _delete, _replace, _swap_lines, _repeat_line, _indent, _splice))(rng, text)
    return text


def _insert(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(SNIPPETS) + text[at:]


def _delete(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + text[at + rng.choice((1, 1, 2, 5, 30)) :]


def _replace(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(SNIPPETS) + text[at + rng.choice((1, 1, 3, 10)) :]


def _repeat_line(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    return "\n".join(lines[:at] + [lines[at]] * rng.choice((2, 2, 3, 50)) + lines[at + 1 :])


def _swap_lines(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return "\n".join(lines)


def _indent(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice(("  ", "\t", " ", "- ")) + lines[at] if rng.random() < 0.5 else lines[at].lstrip()
    return "\n".join(lines)


def _splice(rng: random.Random, text: str) -> str:
    other = rng.choice(SEEDS)
    lines, others = text.split("\n"), other.split("\n")
    return "\n".join(lines[: rng.randint(0, len(lines))] + others[rng.randint(0, len(others)) :])
