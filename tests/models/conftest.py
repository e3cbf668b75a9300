"""LTG-BERT and GPT-BERT at tiny sizes, and the equations they share written out by hand (spec: arXiv 2303.09859)."""

from __future__ import annotations

import math

import pytest
import torch

from antlm_fast.models import GptBert, GptBertConfig, LtgBert, LtgBertConfig

FULL = 2**31 - 1
CLASSES = {"ltg_bert": (LtgBert, LtgBertConfig), "gpt_bert": (GptBert, GptBertConfig)}
TINY = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "position_bucket_size": 8,  # distances above 4 share buckets
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(params=list(CLASSES))
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def tiny():
    """tiny(architecture, **changes): a model of which every parameter counts, biases and norms included."""

    def make(architecture, dtype=torch.float64, seed=0, **changes):
        model_class, config_class = CLASSES[architecture]
        torch.manual_seed(seed)
        made = model_class(config_class(**(TINY | changes))).to(dtype)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3.0)
                elif name.endswith("sum.weight"):
                    parameter.copy_(0.5 * torch.randn_like(parameter))
                else:
                    parameter.add_(0.4 * torch.randn_like(parameter))
        return made

    return make


@pytest.fixture(scope="session")
def tokens():
    def make(*shape, seed=1):
        return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def packed():
    """packed(model, lengths, prefix_len, ids, **options): logits of packed sequences."""

    def run(made, lengths, prefix_len, ids, **options):
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        return made(ids, prefix_len=torch.tensor(prefix_len, dtype=torch.int32), cu_seqlens=cu_seqlens, **options)

    return run


class ByHand:
    """One sequence (seqlen,) at a time, one score at a time, out of a model's parameters by name."""

    def __init__(self, made):
        self.config = made.config
        self.p = dict(made.named_parameters())

    def norm(self, x, name=None):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return x if name is None else x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    @staticmethod
    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def gelu_tanh(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def linear(self, x, name):
        out = x @ self.p[f"{name}.weight"].T
        return out + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else out

    def embedding(self, ids):
        return self.norm(self.p["embedding.table.weight"][ids])

    def bucket(self, distance):
        middle, last = self.config.position_bucket_size // 2, self.config.max_position_embeddings - 1
        r = abs(distance)
        if r > middle:
            r = math.ceil((middle - 1) * math.log(r / middle) / math.log(last / middle) - 1e-9) + middle
        return r if distance >= 0 else -r

    def heads(self, y, v, layer, prefix):
        """softmax(scores) v, with the heads side by side."""
        size, dim = self.config.hidden_size, self.config.hidden_size // self.config.num_attention_heads
        name = f"layers.{layer}.attention.heads.query_key"
        qk, relative = self.linear(y, name), self.norm(self.p["relative.table.weight"], "relative.norm")
        relative = self.linear(relative, name)
        out = []
        for i in range(len(y)):
            seen = min(max(i + 1, prefix), len(y))
            row = []
            for head in range(self.config.num_attention_heads):
                q_columns = slice(head * dim, (head + 1) * dim)
                k_columns = slice(size + head * dim, size + (head + 1) * dim)
                scores = []
                for j in range(seen):
                    at = self.bucket(i - j) + self.config.position_bucket_size - 1
                    q, k = qk[i, q_columns], qk[j, k_columns]
                    score = q @ k + q @ relative[at, k_columns] + k @ relative[at, q_columns]
                    scores.append(score / math.sqrt(3 * dim))
                row.append(torch.stack(scores).softmax(0) @ v[:seen, q_columns])
            out.append(torch.cat(row))
        return torch.stack(out)

    def feed_forward(self, x, layer):
        name = f"layers.{layer}.feed_forward"
        value, gate = self.linear(self.norm(x), f"{name}.wide").chunk(2, -1)
        return self.linear(self.norm(value * self.gelu_tanh(gate)), f"{name}.narrow")

    def logits(self, x):
        x = self.norm(self.gelu(self.linear(self.norm(x), "head.dense")))
        return x @ self.p["embedding.table.weight"].T + self.p["head.bias"]


@pytest.fixture(scope="session")
def by_hand():
    return ByHand


@pytest.fixture(scope="session")
def assert_equal_by_hand():
    """assert_equal_by_hand(model, expected_logits, prefix, ids): logits and the gradient of every parameter."""

    def check(made, expected, prefix, ids):
        got = made(ids[None], prefix_len=torch.tensor([prefix], dtype=torch.int32))[0]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(2))
        names, parameters = zip(*made.named_parameters(), strict=True)
        gradients = (torch.autograd.grad((logits * weights).sum(), parameters) for logits in (got, expected))
        for name, ours, theirs in zip(names, *gradients, strict=True):
            assert theirs.abs().max() > 1e-6, name
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * theirs.abs().max().item(), msg=name)

    return check
