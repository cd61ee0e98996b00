"The config of a checkpoint in Jet-Nemotron's format: the keys are those of the public jetlm_2B.json (github NVlabs/Jet-Nemotron), the class is ours and used in tests only."
from transformers import PreTrainedConfig

NAMES = {"attn": "full_attention", "swa": "sliding_attention", "jet": "linear_attention"}  # the file's words, and those that transformers' caches and masks go by


class JetNemotronConfig(PreTrainedConfig):
    "config.json keeps its own words for the kinds of layers; `layer_types` says them in transformers'."
    model_type = "jet_nemotron"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    efficient_attention_config: dict | None = None  # kind of layer -> its settings
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_theta: float | int = 1e6
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.kinds = kwargs.pop("layer_types", None) or ["attn"] * self.num_hidden_layers
        kwargs.pop("rope_scaling", None)
        super().__post_init__(**kwargs)

    def to_dict(self):
        found = super().to_dict()
        return found | dict(layer_types=found.pop("kinds"))

    @property
    def layer_types(self) -> list[str]: return [NAMES[kind] for kind in self.kinds]

    @property
    def sliding_window(self) -> int: return self.efficient_attention_config["swa"]["window_size"]

    @property
    def head_dim(self) -> int: return self.hidden_size // self.num_attention_heads
