"""A model that reads checkpoints in Jet-Nemotron's format, as code that lies beside the weights. Ours, for tests only; not the published code, and not compared with it.

Known (arXiv 2508.15884 and what is public of the format): three kinds of layers under the name self_attn; full and sliding-window attention with biases on q, k, v, RoPE, neither
qk-norm nor gate; JetBlocks with the gated delta rule, whose value passes through a causal convolution that a small network makes anew for each token, while q and k have none;
q_proj, k_proj, v_proj, a_proj, b_proj, g_proj, o_proj and dynamic_conv1d.kernel_generator.{w1, w2} with a bias on w2; the settings in config.json; the tied head.
Our reading, after other models with the gated delta rule: A_log, dt_bias and o_norm by name and use, SiLU on q, k and behind the convolution, q and k of length one, SiLU in the gate,
the order of channels and taps in w2. In rows of several conversations (chapter 13a) softmax layers mask across their borders and JetBlocks do not.
"""
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qkrestore_nb.hypenet import CACHE, HypeNetMLP, HypeNetRMSNorm
from qkrestore_nb.linear_attention import delta_rule_chunked
from qkrestore_nb.softmax_attention import rope_angles, rotate

from .configuration_jet_nemotron import JetNemotronConfig


class Attention(nn.Module):
    "Layers attn and swa; the mask makes the difference."
    def __init__(self, config, layer_idx):
        super().__init__()
        d, D, self.layer_idx = config.hidden_size, config.head_dim, layer_idx
        self.D = D
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, h * D) for h in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads))
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, False)

    def forward(self, x, rope, mask, cache):
        q, k, v = (project(x).unflatten(-1, (-1, self.D)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, *rope), rotate(k, *rope), v))
        if cache is not None: k, v = cache.update(k, v, self.layer_idx)
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and x.shape[1] > 1, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class DynamicConvolution(nn.Module):
    "A causal convolution of every channel whose taps are made from each token's hidden state."
    def __init__(self, channels, width, d, reduction):
        super().__init__()
        self.width = width
        self.kernel_generator = nn.ModuleDict(dict(w1=nn.Linear(d, d // reduction, False), w2=nn.Linear(d // reduction, channels * width)))

    def forward(self, v, x, cache, layer_idx):
        T = v.shape[1]
        kernel = self.kernel_generator["w2"](F.silu(self.kernel_generator["w1"](x))).unflatten(-1, (-1, self.width))  # (B, T, channels, width)
        if cache is not None: v = cache.update_conv_state(v.transpose(1, 2), layer_idx, conv_kernel_size=self.width).transpose(1, 2)
        v = F.pad(v, (0, 0, self.width - 1, 0))[:, -T - self.width + 1:]
        return F.silu((v.unfold(1, self.width, 1) * kernel).sum(-1))


class JetBlock(nn.Module):
    "The gated delta rule with a dynamic convolution on the value."
    def __init__(self, config, layer_idx):
        super().__init__()
        jet, d, self.layer_idx = config.efficient_attention_config["jet"], config.hidden_size, layer_idx
        H, self.D, self.eps = jet["num_heads"], jet["head_dim"], float(jet["norm_eps"])
        self.V = int(self.D * jet["expand_v"])
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (nn.Linear(d, H * size, False) for size in (self.D, self.D, self.V, self.V))
        self.a_proj, self.b_proj, self.o_proj = nn.Linear(d, H, False), nn.Linear(d, H, False), nn.Linear(H * self.V, d, False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.dynamic_conv1d = DynamicConvolution(H * self.V, jet["conv_size"], d, jet["dconv_generator_reduction"])
        self.o_norm = HypeNetRMSNorm(self.V, self.eps)

    def forward(self, x, rope, mask, cache):
        if mask is not None: x = x * mask[..., None].to(x.dtype)  # a padded token writes nothing
        layer = None if cache is None else cache.layers[self.layer_idx]
        state = layer.recurrent_states[0] if layer is not None and layer.has_previous_state[0] else None
        q, k = (F.normalize(F.silu(project(x)).unflatten(-1, (-1, self.D)).float(), dim=-1) for project in (self.q_proj, self.k_proj))
        v = self.dynamic_conv1d(self.v_proj(x), x, cache, self.layer_idx).unflatten(-1, (-1, self.V)).float()
        decay = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias)
        o, state = delta_rule_chunked(q * self.D ** -.5, k, v, decay, self.b_proj(x).float().sigmoid(), state)
        if cache is not None: cache.update_recurrent_state(state, self.layer_idx)
        o = self.o_norm(o.to(x.dtype)) * F.silu(self.g_proj(x).unflatten(-1, (-1, self.V)))
        return self.o_proj(o.flatten(2))


class JetNemotronDecoderLayer(GradientCheckpointingLayer):
    "x += mixer(norm(x)); x += mlp(norm(x))."
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = (JetBlock if config.kinds[layer_idx] == "jet" else Attention)(config, layer_idx)
        self.mlp = HypeNetMLP(config)
        self.input_layernorm, self.post_attention_layernorm = (HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, rope, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class JetNemotronPreTrainedModel(PreTrainedModel):
    "What transformers asks of a family."
    config_class = JetNemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JetNemotronDecoderLayer"]
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be rolled back


class JetNemotronModel(JetNemotronPreTrainedModel):
    "Embedding, layers, final norm."
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(JetNemotronDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        x, cache = self.embed_tokens(input_ids), kwargs.get(CACHE)
        if use_cache and cache is None: cache = DynamicCache(config=self.config)
        mask = dict(config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids, **{CACHE: cache})
        masks = {"attn": create_causal_mask(**mask), "swa": create_sliding_window_causal_mask(**mask), "jet": create_recurrent_attention_mask(**mask)}
        if position_ids is None: position_ids = torch.arange(x.shape[1], device=x.device)[None] + (0 if cache is None else cache.get_seq_length())
        rope = rope_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        for kind, layer in zip(self.config.kinds, self.layers): x = layer(x, rope, masks[kind], cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})


class JetNemotronForCausalLM(JetNemotronPreTrainedModel, GenerationMixin):
    "The language model."
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = JetNemotronModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0, **kwargs):
        out = self.model(input_ids, attention_mask, position_ids, use_cache, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state[:, -logits_to_keep:]), **{CACHE: getattr(out, CACHE)})
