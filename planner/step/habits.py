"""What a class of transformers does otherwise than most, as one record: the modules of the step read it.

Every field's default is what most decoder classes of transformers do; `planner.step.classes` holds a record for each
class that does something else. Modules ask `step.habits` and never for a model's name. A release named `..._since` or
`..._before` is one of transformers. Functions among the fields take the place of a module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from planner.base.records import record

if TYPE_CHECKING:
    from planner.model.spec import Attention, ModelSpec, Norm
    from planner.step.context import Step
    from planner.step.engine import Size, Tensor
    from planner.step.modules.weights import LayerWeights, LinearWeights
    from planner.training.spec import LoraSpec, TrainingSpec

    Names = tuple[Tensor, ...]
    """What the module's frame still names while its last product runs."""
    Parameters = tuple[Tensor | None, Tensor | None]
    """Weight and bias of a norm."""

Release = tuple[int, int]

NEVER: Release = (1 << 30, 0)
"""Later than every release."""
ALWAYS: Release = (0, 0)


@record
class Habits:
    """How one class of transformers, or a framework's own module, runs a decoder layer and what is around it."""

    doubts: Callable[[ModelSpec, TrainingSpec], Iterator[tuple[str, float]]] | None = None
    """Why the allocated figure of a framework's modules may be off, each with its relative share."""

    # --- the model and its layers ---------------------------------------------------------------------------------

    rebuild: Callable[[ModelSpec, TrainingSpec], tuple[ModelSpec, TrainingSpec]] | None = None
    """The model with a framework's own modules in the place of transformers', and the settings in their names."""
    layer: Callable[[Step, LayerWeights, Tensor], Tensor] | None = None
    """The decoder layer's forward, where it is not one of those of `planner.step.layers`."""
    own_mixers_only: bool = False
    """Whether `layer` and the framework's positions know no other mixers than MIXERS has as `in_own_modules`."""
    inlined_mlp: Callable[[Step, LayerWeights, list[Tensor]], Tensor] | None = None
    """The layer's own calls of its linear modules instead of an MLP's; it takes its input out of the list."""
    makes_buffers: Callable[[Step], list[Tensor]] | None = None
    """Buffers of the model, made after the embedding while loading."""
    makes_layer_buffer: Callable[[Step], Tensor | None] | None = None
    """A buffer of every layer, in the releases that have it."""
    layer_buffer_first: bool = False
    """It is made before the layer's weights, not after them."""
    makes_own_state: Callable[[Step, Tensor], tuple[list[Tensor], list[Tensor]]] | None = None
    """What a framework keeps beside the loaded model, given its embedding: buffers; the embedding in use."""
    load_adapter: Callable[[Step, LinearWeights, LoraSpec], None] | None = None
    """How LoRA's factors lie, where not as PEFT's."""
    norm: Callable[[Step, Norm, Parameters, Tensor], Tensor] | None = None
    """The final norm, where it is not a module of `planner.step.modules.norms`."""
    scales_in_embedding_since: Release = NEVER
    """Since: the embedding module multiplies its output itself, before a hook on it; else the model does."""
    positions_of_rows_before: Release = ALWAYS
    """Before: learned positions are looked up for every row, counted from its attention mask; else for one row."""
    ignores_checkpoints: tuple[Release, Release] = (ALWAYS, ALWAYS)
    """From the one to before the other: the class checkpoints nothing though asked to."""
    halves_quantized: bool = False
    """Modules with a quantized weight hold everything else in fp16."""
    adds_bias_apart: bool = True
    """A subclass of nn.Linear adds its bias in a pass of its own."""

    # --- positions ------------------------------------------------------------------------------------------------

    gives_tables: Callable[[Step, list[Tensor]], tuple[Tensor, Tensor] | None] | None = None
    """Rotary tables out of the model's buffers, instead of new ones in every forward; None: it needs none."""
    counts_positions: bool = True
    """Whether position ids are made where `gives_tables` serves the tables."""
    tables_beside_alibi: bool = False
    """Rotary tables are made though positions are ALiBi."""
    tables_by_window: bool = False
    """Layers with a window have rotary tables of their own."""
    tables_per_layer_before: Release = ALWAYS
    """Before: the attention module calls rotary_emb itself, its results are names of the module's frame."""
    loaded_tables_before: Release = ALWAYS
    """Before: every attention module holds the tables of all positions as buffers (cos_cached, sin_cached), whose rows
    apply_rotary_pos_emb copies."""
    loaded_tables_fp32: bool = False
    """Those buffers are fp32, not in the model's dtype."""
    computes_beside_loaded: bool = False
    """Those buffers are for older code to read: the tables are computed all the same."""
    half_tables: bool = False
    """Rotary tables hold each angle once."""
    fp32_tables_since: Release = NEVER
    """Since: cos and sin stay fp32: so are products with them, and both results are cast back at the end."""
    fp32_rotary: bool = False
    """apply_rotary_pos_emb casts q and k to fp32 first, and back at its end."""
    casts_in_products: bool = False
    """q and k are cast to the tables' dtype in each product."""
    interleaves_tables: bool = False
    """cos and sin are copied in every layer, each entry twice."""
    joins_nothing_since: Release = NEVER
    """Since: what is not rotated is appended even where that is nothing: a copy."""
    rotate: Callable[[Step, Attention, Tensor, Tensor, str], tuple[Tensor, Tensor, Names]] | None = None
    """Rotates q and k, given v's dtype; and the parts that the frame names."""
    turn: Callable[[Step, Tensor, Size, Size, tuple[Tensor, Tensor]], Tensor] | None = None
    """Rotates one of them."""
    rotates_tokens_first: bool = False
    """Rotation comes before heads lead, so its result lies token by token."""
    splits_heads: bool = True
    """A projection's output is viewed by heads before the rotation."""

    # --- attention ------------------------------------------------------------------------------------------------

    splits_projection: Callable[[Step, Attention, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    """q, k, v out of a fused projection, which the frame then names to its end; else torch.split."""
    scales_query: bool = False
    """The query is multiplied by the softmax scale before attention."""
    expands_heads: bool = False
    """Every key/value head is copied to its query heads first; a single one is left as it is, for SDPA to broadcast."""
    repeats_in_module_before: Release = (4, 48)
    """Before: the attention module itself repeats key/value heads to all query heads, under the same names (repeat_kv
    in the attention classes of 4.40 to 5.12); since then the attention function does, if at all."""
    repeats_for_flash: bool = False
    """Their flash attention class did so too."""
    passes_groups_since: Release = (4, 54)
    """Since: grouped heads are left to SDPA where it has no mask (integrations/sdpa_attention.py use_gqa_in_sdpa; not
    in 4.53.3)."""
    copies_for_sdpa_since: Release = (4, 48)
    """Since, until `attention.COPIES_FOR_SDPA_BEFORE`: SDPA gets contiguous copies of q, k, v (integrations/
    sdpa_attention.py); NEVER: the class called SDPA itself."""
    caches_before: Release = ALWAYS
    """Before: checkpointing left use_cache on, so every layer's keys and values stay until the loss is taken."""
    fuses_lora: bool = True
    """fms replaces groups of adapted quantized projections by one function."""
    attend: Callable[[Step, Attention, Tensor, Tensor, Tensor], Tensor] | None = None
    """The attention kernel, where the class calls one itself."""
    eager: Callable[[Step, Attention, Tensor, Tensor, Tensor, str], tuple[Tensor, Names]] | None = None
    """Its own eager attention, given the dtype of the layer's input."""
    names_score_casts: bool = True
    """fp32 casts of q and k have names that live until the output exists."""
    keeps_scores_dtype: bool = False
    """Softmax names no dtype: it runs in that of the scores, fp32 under autocast."""
    returns_probabilities_since: Release = NEVER
    """Since: the decoder layer returns the attention probabilities (before, where it is asked for them)."""
    always_masks_since: Release = NEVER
    """Since: SDPA gets a 4-D mask of bools where its causal flag would do."""
    hands_on_mask_before: Release = ALWAYS
    """Before: the model makes an additive mask for SDPA though nothing is padded."""
    mask_buffers_before: Release = ALWAYS
    """Before: every layer holds a causal mask of bools for all positions (a buffer "bias"), by which eager attention
    fills its scores (torch.where)."""
    adds_mask_since: Release = NEVER
    """Since: scores so filled get the model's additive mask too."""
    boolean_mask: bool = False
    """Eager attention fills by a bool mask instead of adding one."""
    alibi_in_mask: bool = False
    """ALiBi is written into the mask, one for every head."""
    alibi_of_longest: bool = False
    """ALiBi's bias is made once, in fp32, for the longest row; else for every row of the batch."""
    masks_by_window: bool = True
    """Layers with a window get a mask of their own."""

    # --- feed-forward and experts ---------------------------------------------------------------------------------

    up_first: bool = False
    """Both projections run before the activation."""
    writes_out_activations: bool = True
    """Activations are those of transformers' activations.py, some written out pass by pass."""
    activation: Callable[[Step, Tensor], Tensor] | None = None
    """The class's own activation function."""
    shared_first: bool = False
    """The shared expert runs before the router."""
    router_dtype: Literal["fp32", "hidden", "logits"] = "fp32"
    """What the fp32 top-k weights are cast to: nothing, the hidden states' dtype, the router logits'."""

    # --- head and loss --------------------------------------------------------------------------------------------

    head_and_loss: Callable[[Step, LinearWeights, Tensor], tuple[Tensor, list[Tensor]]] | None = None
    """Head and chunked loss of a framework."""
    slices_hidden_since: Release = (4, 45)
    """Since: the head reads hidden_states[:, -0:, :] (logits_to_keep)."""
    upcasts_in_forward_before: Release = (4, 46)
    """Before: the model's forward replaces the logits by their fp32 copy (`logits = logits.float()` in the modeling
    files of 4.40 to 4.57)."""
    upcasts_since: Release = ALWAYS
    """Before: the class calls CrossEntropyLoss on 16-bit logits."""
    always_shifts: bool = False
    """logits[..., :-1, :] is copied whatever the release."""


COMMON = Habits()
"""What most classes do."""


OWN_LOSS: Release = (4, 49)
"""Release since which these classes leave the loss to loss_function, which casts logits to fp32: 4.48.0 to 4.48.2 call
CrossEntropyLoss in the class, 4.48.3 does not any more (modeling files of bloom, falcon, gpt2, gpt_bigcode, mpt and
opt)."""


def last_patch_casts(model: ModelSpec, training: TrainingSpec) -> Iterator[tuple[str, float]]:
    """Doubts of those classes: a release is known without its patch."""
    if training.versions.transformers == (4, 48):
        yield "transformers 4.48.3 casts the logits to fp32, 4.48.0 to 4.48.2 do not", 0.4
