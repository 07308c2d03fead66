"""What a training is configured by: frozen, typed, checked."""

from __future__ import annotations

from typing import Literal

import msgspec

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.zones import ZoneSpec


def _check(config: msgspec.Struct, minimum: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= minimum:  # NaN fails too
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(config, name)}")


def _check_heads(config: VisionConfig | QFormerConfig) -> None:
    if config.hidden_size % config.heads:
        raise ValueError(f"hidden_size must be a multiple of heads, got {config.hidden_size} and {config.heads}")


def _mlp_width(config: VisionConfig | QFormerConfig) -> int:
    return config.mlp_size or int(config.hidden_size * config.mlp_ratio)


Activation = Literal["gelu", "quick_gelu"]


class VisionConfig(Contract, frozen=True):
    """The `Blip2VisionModel`. `mlp_size` is the MLP's exact width (ViT-g: 6144 at 1408); 0: `hidden_size` * `mlp_ratio`.

    `pre_norm`: a LayerNorm between the embeddings and the first block (CLIP's towers, so LAVIS's ViT-L). `final_norm_eps`: epsilon of
    the LayerNorm after the last block, where it differs from the others' (LAVIS's `ln_vision` on ViT-g: 1e-5); 0: `layer_norm_eps`.
    """

    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    mlp_ratio: float = 4.0
    mlp_size: int = 0
    patch_size: int = 8
    layer_norm_eps: float = 1e-6
    activation: Activation = "gelu"
    qkv_bias: bool = True
    pre_norm: bool = False
    final_norm_eps: float = 0.0

    def __post_init__(self) -> None:
        _check(self, 1, "hidden_size", "layers", "heads", "patch_size")
        _check(self, 0, "mlp_size", "layer_norm_eps", "final_norm_eps")
        _check_heads(self)

    @property
    def mlp_width(self) -> int:
        return _mlp_width(self)


class QFormerConfig(Contract, frozen=True):
    """`Blip2QFormerModel` with its text embeddings; D = `embedding_dim`; M = `query_tokens`, or 1 when `pooled`.

    `mlp_size` as in VisionConfig. `vocab_size` 0: the tokenizer's. `position_embeddings`, the size of the text's position
    table, 0: `max_text_length`, which counts special tokens; longer texts are cut there.
    """

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    mlp_size: int = 0
    query_tokens: int = 8
    embedding_dim: int = 64
    cross_attention_frequency: int = 1
    max_text_length: int = 32
    dropout: float = 0.0
    pooled: bool = False
    layer_norm_eps: float = 1e-12
    activation: Activation = "gelu"
    vocab_size: int = 0
    position_embeddings: int = 0

    def __post_init__(self) -> None:
        _check(self, 1, "hidden_size", "layers", "heads", "query_tokens", "embedding_dim", "cross_attention_frequency")
        _check(self, 3, "max_text_length")  # two special tokens and a word
        _check(self, 0, "mlp_size", "layer_norm_eps", "vocab_size", "position_embeddings")
        _check_heads(self)
        if 0 < self.position_embeddings < self.max_text_length:
            raise ValueError(f"max_text_length {self.max_text_length} exceeds position_embeddings, {self.position_embeddings}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def mlp_width(self) -> int:
        return _mlp_width(self)


BaseQuery = Literal["mean", "cls", "pool", "two_pass", "two_encoders", "zero_shot"]
WeightInputs = Literal["text", "text+image", "constant"]


class ModelConfig(Contract, frozen=True):
    """What a model is made of.

    `base_query`, how q0 is made (docs/method.md, equation 3): "mean" of the query outputs (QuRe), the "cls" token of the text (BLIP-2's
    text feature), "pool", the mean plus one learned attention pool over query and text tokens alike, without a name or a label;
    "two_pass", the text's [CLS] of a second pass over the query outputs and the text (SPRC); "two_encoders", the same with text embeddings
    and a Q-Former of the second pass's own (SPN4CIR); or "zero_shot", the embeddings of image and
    text added, as BLIP-2 gives them without any training for composed queries. `text_share`, from 0 to 1: the text's share of the sum that
    "zero_shot" is; no other reads it.
    `attribute_weights` off gives q = q0: no learnable attribute weights (LAW). `weights_from`, what the weights are read off: the words
    alone, the words and the attribute's pooled fused tokens, which have seen the reference image, or nothing ("constant": half the learned
    gain, whatever is asked; a control). `learned_temperature`: the losses' temperature is a parameter that starts at `loss.temperature`
    (SPRC, QuRe). `captions`: what becomes of a text before it is tokenised,
    "plain" nothing, "blip" what `TokenizerSpec` says.
    """

    preprocessing: PreprocessingSpec
    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    base_query: BaseQuery = "mean"
    text_share: float = 0.5
    attribute_weights: bool = True
    weights_from: WeightInputs = "text"
    learned_temperature: bool = False
    captions: Literal["plain", "blip"] = "plain"

    def __post_init__(self) -> None:
        if self.preprocessing.image_size < self.vision.patch_size:
            raise ValueError(f"image_size {self.preprocessing.image_size} holds no patch of {self.vision.patch_size}")
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"text_share must lie in [0, 1], got {self.text_share}")


class LossConfig(Contract, frozen=True):
    """Weights and temperatures; equations in docs/method.md.

    `objective`: "kl" is the paper's KL relevance loss; "infonce" the contrastive baseline, and SPRC's first loss; "pairwise" compares a
    target with its mined negative alone, so that the ranking loss is the objective (QuRe). `ranking`: the form of the ranking loss;
    `rank_margin` is in score units and read by "margin" alone. A weight of 0 turns a part off. `relevance_spread`: whether the KL loss
    spreads `relevance_share` by how similar the targets are, at `relevance_temperature`, or evenly ("uniform": label smoothing, a control).

    `filter`: which of a batch's targets are left out of a row's negatives by their score, above the target's score less `filter_margin`
    ("absolute"), or above that score times 1 - `filter_margin` ("relative"); GISTEmbed's. `filter_guide`: whose scores these are, the
    model's "own" as it trains, or those that the checkpoint `start` gives.
    `prompt_weight`, `align_weight`: SPRC's auxiliary losses.
    """

    objective: Literal["kl", "infonce", "pairwise"] = "kl"
    temperature: float = 0.07
    relevance_temperature: float = 0.2
    relevance_share: float = 0.1
    relevance_warmup: float = 0.3
    relevance_spread: Literal["similarity", "uniform"] = "similarity"
    rank_weight: float = 0.5
    ranking: Literal["logistic", "margin"] = "logistic"
    rank_margin: float = 0.1
    attribute_weight: float = 0.1
    attribute_margin: float = 0.2
    presence_weight: float = 0.5
    filter: Literal["off", "absolute", "relative"] = "off"
    filter_margin: float = 0.0
    filter_guide: Literal["own", "start"] = "own"
    prompt_weight: float = 0.0
    align_weight: float = 0.0

    def __post_init__(self) -> None:
        _check(self, 1e-4, "temperature", "relevance_temperature")
        _check(self, 0, "relevance_warmup", "rank_weight", "rank_margin", "attribute_weight", "presence_weight")
        _check(self, 0, "filter_margin", "prompt_weight", "align_weight")
        if self.filter == "relative" and self.filter_margin > 1:
            raise ValueError(f"a relative filter_margin is a share, so at most 1, got {self.filter_margin}")
        if self.filter == "off" and (self.filter_margin > 0 or self.filter_guide != "own"):
            raise ValueError("filter_margin and filter_guide are set, but filter is off; set filter to absolute or relative")
        if self.objective == "pairwise" and self.rank_weight == 0:
            raise ValueError("objective pairwise is the ranking loss alone, so rank_weight must be above 0")
        if self.objective == "pairwise" and (self.filter != "off" or self.prompt_weight > 0):
            raise ValueError("objective pairwise has no in-batch negatives, so filter must be off and prompt_weight 0")
        if not 0 <= self.relevance_share < 0.5:
            raise ValueError(f"relevance_share must lie in [0, 0.5), so that the ground truth counts most, got {self.relevance_share}")


class TRNSConfig(Contract, frozen=True):
    """Target relative negative sampling. `warmup_epochs` without mined negatives, then a refresh every `interval`.

    `warmup`, what there is until the first refresh: no negatives, or "random" ones (QuRe's).
    `rule`, where negatives come from: the mid zone of `zones`, or what lies between the two steepest drops of the scores below the
    target ("two-drops", QuRe's), which reads no bounds.
    """

    enabled: bool = True
    rule: Literal["zones", "two-drops"] = "zones"
    warmup: Literal["none", "random"] = "none"
    warmup_epochs: int = 1
    interval: int = 1
    picks: int = 16
    zones: ZoneSpec = ZoneSpec(lo=0.002, hi=0.02, bounds="pooled", policy="uniform")

    def __post_init__(self) -> None:
        _check(self, 1, "interval", "picks")
        _check(self, 0, "warmup_epochs")
        if self.warmup == "random" and (not self.enabled or self.warmup_epochs == 0):
            raise ValueError("warmup is random, but there is none; set enabled to true and warmup_epochs to 1 or more, or warmup to none")


class OptimConfig(Contract, frozen=True):
    """AdamW with linear warm-up and cosine decay to `final_share` of the rate.

    `steps` above 0 trains so many steps instead of `epochs`, the last epoch perhaps in part. `seconds` above 0 trains for that long:
    the schedule then follows the clock, so what is trained depends on what else the machine does. `heads_learning_rate`, for the
    attribute heads, which no backbone brings, 0: `learning_rate`. `decay_vectors`: `weight_decay` also for biases and norms.
    `clip_norm` 0: gradients are not clipped. `vision_precision` of a frozen tower; "auto": float16
    on CUDA, float32 elsewhere.

    `batch_size` is the whole batch, whatever the number of ranks that share it. For batches beyond memory (docs/training-at-scale.md):
    `cached_chunk` above 0 encodes that many triplets at a time on each rank (GradCache), with the gradients of the whole batch;
    `checkpoint_activations` keeps only the inputs of the Q-Former's layers and computes the rest again.
    """

    epochs: int = 3
    steps: int = 0
    seconds: float = 0.0
    batch_size: int = 128
    learning_rate: float = 1e-3
    vision_learning_rate: float = 0.0
    heads_learning_rate: float = 0.0
    weight_decay: float = 0.05
    decay_vectors: bool = False
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_share: float = 0.05
    final_share: float = 0.01
    clip_norm: float = 1.0
    autocast: Literal["off", "bf16", "f16"] = "off"
    cached_chunk: int = 0
    checkpoint_activations: bool = False
    vision_precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    checkpoint_every: int = 200
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (in-batch contrast), got {self.batch_size}")
        _check(self, 1, "checkpoint_every", "log_every")
        _check(self, 0, "seed", "steps", "seconds", "learning_rate", "vision_learning_rate", "heads_learning_rate", "weight_decay")
        _check(self, 0, "warmup_share", "clip_norm", "cached_chunk")
        if self.epochs < 1 and not self.steps and not self.seconds:
            raise ValueError("nothing to train: epochs, steps and seconds are all 0")
        if self.steps and self.seconds:
            raise ValueError(f"a training ends after steps or after seconds, got {self.steps} and {self.seconds}; set one of them to 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.vision_learning_rate > 0 and self.vision_precision in ("float16", "bfloat16"):
            raise ValueError(f"a vision tower that trains is kept in float32, got vision_precision {self.vision_precision}")


class LoRAConfig(Contract, frozen=True):
    """Low-rank adapters of the Q-Former (`finetune: lora`): on the linear layers whose name ends in one of `targets`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "dense")

    def __post_init__(self) -> None:
        _check(self, 1, "rank")
        _check(self, 1e-6, "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError("targets is empty; name linear layers such as query and value, or set finetune to heads")


class TrainConfig(Contract, frozen=True):
    """`vision_learning_rate` 0 freezes the vision tower: image tokens are then computed once and kept.

    `backbone`: a BLIP-2 image-text checkpoint, "owner/name[@revision]" on the hub or a directory; `model` then starts from
    its configuration (`load_config`). `start`: a checkpoint of `dqe-train`, RUN/model, to begin with; `model` and the tokenizer
    are then its own. `vision_weights`: a `dqe-pretrain` output directory, "garments" for the one that ships, or empty for random.
    At most one of the three.

    `finetune`: "full" trains everything but the frozen tower, "lora" adapters of the Q-Former, the projections and the
    attribute heads, "heads" only the last two, "attributes" only the last: every other weight keeps its bits.
    """

    model: ModelConfig
    loss: LossConfig = LossConfig()
    trns: TRNSConfig = TRNSConfig()
    optim: OptimConfig = OptimConfig()
    vision_weights: str = ""
    backbone: str = ""
    finetune: Literal["full", "lora", "heads", "attributes"] = "full"
    lora: LoRAConfig = LoRAConfig()
    start: str = ""

    def __post_init__(self) -> None:
        if self.model.learned_temperature and not 0.01 <= self.loss.temperature <= 0.5:
            raise ValueError(
                f"a learned temperature is kept within 0.01 and 0.5, so loss.temperature must be too, got {self.loss.temperature}"
            )
        if self.start and (other := self.backbone or self.vision_weights):
            raise ValueError(f"start {self.start} brings all weights, so backbone and vision_weights must be empty, got {other}")
        if self.backbone and self.vision_weights:
            raise ValueError(f"backbone {self.backbone} brings a vision tower, so vision_weights must be empty, got {self.vision_weights}")
        self._check_losses()
        if self.encoder_frozen:
            self._check_encoder_frozen()

    def _check_losses(self) -> None:
        loss, trns = self.loss, self.trns
        if self.model.attribute_weights and self.model.weights_from == "constant" and loss.presence_weight > 0:
            raise ValueError(
                "model.weights_from constant reads no text, so nothing can learn which attributes a text names; set loss.presence_weight "
                f"to 0, got {loss.presence_weight:g}"
            )
        if loss.objective == "pairwise" and not (trns.enabled and (trns.warmup == "random" or trns.warmup_epochs == 0)):
            raise ValueError(
                "loss.objective pairwise needs a negative at every step, so set trns.enabled to true, and trns.warmup to random or "
                "trns.warmup_epochs to 0"
            )
        if loss.filter_guide == "start" and not (self.start and self.optim.vision_learning_rate == 0):
            raise ValueError("loss.filter_guide start judges by a checkpoint, so set start, and optim.vision_learning_rate to 0")
        if loss.prompt_weight > 0:
            q = self.model.qformer
            places, needed = q.position_embeddings or q.max_text_length, q.max_text_length + q.query_tokens
            if places < needed:
                raise ValueError(
                    f"loss.prompt_weight puts {q.query_tokens} tokens into a text of {q.max_text_length}, but there are "
                    f"{places} positions; set model.qformer.position_embeddings to {needed}, or a smaller max_text_length"
                )

    def _check_encoder_frozen(self) -> None:
        if not (self.start or self.backbone):
            raise ValueError("finetune attributes keeps the encoder as it is, so set start to a checkpoint of dqe-train that has one")
        if not self.model.attribute_weights:
            raise ValueError("finetune attributes trains the attribute heads, but model.attribute_weights is false; set it to true")
        if (rate := self.optim.vision_learning_rate) > 0:
            raise ValueError(f"finetune attributes keeps the encoder as it is, so optim.vision_learning_rate must be 0, got {rate}")
        if self.prompted:
            raise ValueError("finetune attributes keeps the encoder as it is, so loss.prompt_weight and align_weight must be 0")
        if self.start and (precision := self.optim.vision_precision) in ("float16", "bfloat16"):
            raise ValueError(f"finetune attributes keeps every bit of the encoder, so set vision_precision to auto, got {precision}")

    @property
    def encoder_frozen(self) -> bool:
        """Whether nothing but the attribute heads trains."""
        return self.finetune == "attributes"

    @property
    def prompted(self) -> bool:
        """Whether SPRC's prompt tokens train beside the model."""
        return self.loss.prompt_weight > 0 or self.loss.align_weight > 0

    @property
    def vision_random(self) -> bool:
        """Whether the vision tower would stay as it is initialised: nothing brings another, and it does not train."""
        return not (self.vision_weights or self.backbone or self.start) and self.optim.vision_learning_rate == 0
