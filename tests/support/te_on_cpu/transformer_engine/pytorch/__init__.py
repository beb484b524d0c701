"""`transformer_engine.pytorch`: linear layers, norms and attention of one process, in plain PyTorch.

Shapes: s positions, b rows, t tokens of packed documents, n heads, d width of a head.
"""

import itertools

import torch
from torch.nn.functional import layer_norm, linear, rms_norm

from . import distributed, fp8  # noqa: F401


def _weight(rows: int, columns: int, init_method, dtype) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype))
    with torch.no_grad():
        init_method(weight)
    return weight


class _Norm(torch.nn.Module):
    has_bias = False

    def __init__(self, normalized_shape, *, eps, zero_centered_gamma=False, params_dtype=torch.float32, **_):
        super().__init__()
        if zero_centered_gamma:
            raise NotImplementedError("zero_centered_gamma")
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        if self.has_bias:
            self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, dtype=params_dtype))


class RMSNorm(_Norm):
    def forward(self, x):
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(_Norm):
    has_bias = True

    def forward(self, x):
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        init_method,
        bias,
        return_bias,
        parallel_mode,
        tp_size,
        params_dtype=torch.float32,
        **_,
    ):
        super().__init__()
        if tp_size > 1:
            raise NotImplementedError(f"tp_size {tp_size}")
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.return_bias, self.parallel_mode, self.tp_size = return_bias, parallel_mode, tp_size
        self.weight = _weight(out_features, in_features, init_method, params_dtype)
        # without a bias, Transformer Engine has an empty tensor
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else torch.Tensor()

    def forward(self, x, is_first_microbatch=None):
        out = linear(x, self.weight, self.bias if self.use_bias and not self.return_bias else None)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(
        self, in_features, out_features, *, eps, normalization, return_layernorm_output, zero_centered_gamma, **rest
    ):
        super().__init__(in_features, out_features, **rest)
        if zero_centered_gamma:
            raise NotImplementedError("zero_centered_gamma")
        self.eps, self.normalization, self.return_layernorm_output = eps, normalization, return_layernorm_output
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features))
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features)) if normalization == "LayerNorm" else None

    def forward(self, x, is_first_microbatch=None):
        shape = self.layer_norm_weight.shape
        if self.normalization == "RMSNorm":
            x = rms_norm(x, shape, self.layer_norm_weight, self.eps)
        else:
            x = layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        out = super().forward(x)
        if not self.return_layernorm_output:
            return out
        return (*out, x) if self.return_bias else (out, x)


class GroupedLinear(torch.nn.Module):
    single_grouped_weight = False

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        *,
        init_method,
        bias,
        return_bias,
        parallel_mode,
        tp_size,
        params_dtype=torch.float32,
        **_,
    ):
        super().__init__()
        if tp_size > 1 or bias:
            raise NotImplementedError(f"tp_size {tp_size}, bias {bias}")
        self.num_gemms, self.in_features, self.out_features, self.use_bias = num_gemms, in_features, out_features, bias
        self.return_bias, self.parallel_mode, self.tp_size = return_bias, parallel_mode, tp_size
        for expert in range(num_gemms):
            self.register_parameter(f"weight{expert}", _weight(out_features, in_features, init_method, params_dtype))

    def forward(self, x, m_splits, is_first_microbatch=None):
        parts = x.split([int(rows) for rows in m_splits])
        return torch.cat([linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        *,
        num_gqa_groups=None,
        attention_dropout=0.0,
        attn_mask_type="causal",
        softmax_scale=None,
        tp_size=1,
        **_,
    ):
        super().__init__()
        if tp_size > 1 or attention_dropout or attn_mask_type not in ("causal", "padding_causal"):
            raise NotImplementedError(f"tp_size {tp_size}, dropout {attention_dropout}, mask {attn_mask_type}")
        self.num_attention_heads, self.softmax_scale = num_attention_heads, softmax_scale

    def forward(self, query, key, value, attention_mask, *, qkv_format="sbhd", cu_seqlens_q=None, **packed):
        if qkv_format == "sbhd":
            return self._attend(query, key, value)
        padded = packed.get("cu_seqlens_q_padded")
        bounds = (cu_seqlens_q if padded is None else padded).tolist()
        parts = [
            self._attend(*(x[start:end, None] for x in (query, key, value)))[:, 0]
            for start, end in itertools.pairwise(bounds)
            if end > start
        ]
        return torch.cat(parts)

    def _attend(self, query, key, value):
        """[s, b, n, d] to [s, b, n * d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)
