"""The models written out: one document, one token, one head at a time. Slow on purpose, and its own second opinion.

From the equations of Titans (arXiv 2501.00663) and docs/models.md. It shares with titans_pretrain only the configuration and the
parameters, by name: no state but Python lists, no chunked form, no batch, no padding (a packed document is what it is alone), and
every inner gradient by automatic differentiation of the inner loss. Vectors are 1-D tensors; a sequence is a list of them.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from titans_pretrain.config.model import ModelConfig


def naive_logits(p: dict[str, Tensor], config: ModelConfig, tokens: list[int]) -> Tensor:
    """Logits [T, vocab] of one document. p: the model's parameters by name, float64."""
    xs = [p["embed_tokens.weight"][token] for token in tokens]
    for i in range(config.layers):
        xs = block(under(p, f"layers.{i}."), layer_settings(config, i), xs)
    head = p["embed_tokens.weight"] if config.tie_embeddings else p["lm_head.weight"]
    return torch.stack([head @ rms_norm(x, p["norm.weight"], config.norm_eps) for x in xs])


def layer_settings(config: ModelConfig, i: int) -> SimpleNamespace:
    """What layer i goes by: the model's settings, but for those of its entry in the pattern, which is repeated."""
    c = SimpleNamespace(**vars(config))
    entry = config.variant if config.pattern is None else config.pattern[i % len(config.pattern)]
    for key, value in ({"variant": entry} if isinstance(entry, str) else entry).items():
        setattr(c, key, replace(getattr(c, key), **value) if key in ("memory", "mac") else value)
    c.head_dim = c.head_dim or c.dim // c.heads
    c.kv_heads = c.kv_heads or c.heads
    return c


def naive_loss(logits: Tensor, labels: list[int]) -> Tensor:
    """Sum of the cross-entropies where there is a label; labels[t] is the target of position t, -100 none."""
    return sum(row.exp().sum().log() - row[label] for row, label in zip(logits, labels, strict=True) if label != -100)


def under(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Blocks


def block(p: dict[str, Tensor], c: SimpleNamespace, xs: list[Tensor]) -> list[Tensor]:
    def norm(name: str, ys: list[Tensor]) -> list[Tensor]:
        return [rms_norm(y, p[f"{name}.weight"], c.norm_eps) for y in ys]

    def add(ys: list[Tensor]) -> list[Tensor]:
        return [x + y for x, y in zip(xs, ys, strict=True)]

    normed = norm("mixer_norm", xs)
    if c.variant == "lmm":
        xs = add(remember(p, c, normed))
    elif c.variant == "transformer":
        xs = add(attend(p, c, normed))
    elif c.variant == "mal":
        xs = add(remember(p, c, normed))
        xs = add(attend(p, c, norm("attention_norm", xs)))
    elif c.variant == "mag":
        xs = add(gate(p, c, attend(p, c, normed), remember(p, c, normed)))
    else:
        xs = add(memory_as_context(p, c, normed))
    return add([swiglu(under(p, "mlp."), x) for x in norm("mlp_norm", xs)])


def swiglu(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return p["down_proj.weight"] @ (silu(p["gate_proj.weight"] @ x) * (p["up_proj.weight"] @ x))


def gate(p: dict[str, Tensor], c: SimpleNamespace, ys: list[Tensor], ms: list[Tensor]) -> list[Tensor]:
    """Attention's y let through by the memory's m (eq. 25, 28)."""
    return [
        rms_norm(y, p["gate.y_norm.weight"], c.norm_eps) * sigmoid(rms_norm(m, p["gate.m_norm.weight"], c.norm_eps))
        for y, m in zip(ys, ms, strict=True)
    ]


# Attention


class Attention:
    """Queries, keys and values of a layer's heads, cut from the projections in order."""

    def __init__(self, p: dict[str, Tensor], c: SimpleNamespace):
        self.p, self.c = p, c
        self.size = c.head_dim
        self.rotary = int(self.size * c.rotary_percent) // 2 * 2

    def heads(self, name: str, x: Tensor) -> list[Tensor]:
        y = self.p[f"{name}_proj.weight"] @ x
        heads = [y[i : i + self.size] for i in range(0, len(y), self.size)]
        if self.c.qk_norm and name != "v":
            heads = [rms_norm(head, self.p[f"{name}_norm.weight"], self.c.norm_eps) for head in heads]
        return heads

    def query(self, x: Tensor, position: int) -> list[Tensor]:
        return [self.turned(q, position) for q in self.heads("q", x)]

    def key_value(self, x: Tensor, position: int | None) -> list[tuple[Tensor, Tensor]]:
        """Per head. position None: a token without a place, whose key is nothing where positions turn."""
        found = []
        for k, v in zip(self.heads("k", x), self.heads("v", x), strict=True):
            if position is None:
                k = torch.cat((torch.zeros(self.rotary, dtype=k.dtype), k[self.rotary :]))
            else:
                k = self.turned(k, position)
            found.append((k, v))
        return found

    def turned(self, x: Tensor, position: int) -> Tensor:
        """RoPE: dimension i and i + half make a plane, turned by position * theta^(-i / half)."""
        half = self.rotary // 2
        out = list(x)
        for i in range(half):
            angle = position * self.c.rope_theta ** (-i / half)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return torch.stack(out)

    def output(self, query: list[Tensor], seen: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """seen: the keys and values of what this query sees, per token and head of keys; several heads of queries share one."""
        parts = []
        for h, q in enumerate(query):
            kv = [token[h * self.c.kv_heads // self.c.heads] for token in seen]
            weights = torch.stack([(q * k).sum() for k, _ in kv]).div(math.sqrt(self.size)).exp()
            parts.append(sum(w * v for w, (_, v) in zip(weights / weights.sum(), kv, strict=True)))
        return self.p["o_proj.weight"] @ torch.cat(parts)


def attend(p: dict[str, Tensor], c: SimpleNamespace, xs: list[Tensor]) -> list[Tensor]:
    """The persistent tokens and the last `window` tokens, the query's own included (section 4.2)."""
    attention = Attention(under(p, "attention."), c)
    always = [attention.key_value(x, None) for x in persistent(p)]
    tokens = [attention.key_value(x, t) for t, x in enumerate(xs)]
    window = c.window or len(xs)
    return [
        attention.output(attention.query(x, t), always + tokens[max(0, t - window + 1) : t + 1])
        for t, x in enumerate(xs)
    ]


def persistent(p: dict[str, Tensor]) -> list[Tensor]:
    return list(p.get("persistent", ()))


def memory_as_context(p: dict[str, Tensor], c: SimpleNamespace, xs: list[Tensor]) -> list[Tensor]:
    """Equations 21 to 25, each row seeing what was retrieved for itself and the rows before it in its segment."""
    attention, memory = Attention(under(p, "attention."), c), Memory(under(p, "memory."), c, [])
    always = [attention.key_value(x, None) for x in persistent(p)]
    ys, ms = [], []
    for t, x in enumerate(xs):
        if t % c.mac.segment == 0:
            at_start, segment, retrieved = memory.weights, [], []
            if c.mac.memory_tokens:
                asked = [memory.recall(list(q), at_start) for q in p["memory_queries"]]
                retrieved = [attention.key_value(h, None) for h in asked]
        if not c.mac.memory_tokens:
            h = memory.recall(memory.heads(silu(p["retrieve_proj.weight"] @ x)), at_start)
            retrieved.append(attention.key_value(h, t))
        segment.append(attention.key_value(x, t))
        y = attention.output(attention.query(x, t), always + retrieved + segment)
        ys.append(y)
        written = x + y if c.mac.residual else y
        ms.append(memory.read(rms_norm(written, p["write_norm.weight"], c.norm_eps)))
    return gate(p, c, ys, ms)


# The neural memory


def remember(p: dict[str, Tensor], c: SimpleNamespace, xs: list[Tensor]) -> list[Tensor]:
    memory = Memory(under(p, "memory."), c, persistent(p))
    return [memory.read(x) for x in xs]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum() + 1e-6).sqrt()


def presence(x: Tensor) -> Tensor:
    """1, but for a vector of next to no length."""
    return x.square().mean() / (x.square().mean() + 1e-4)


class Memory:
    """Equations 12 to 15, token by token. weights, surprise: per head, per memory layer [d_in, d_out]."""

    def __init__(self, p: dict[str, Tensor], c: SimpleNamespace, first: list[Tensor]):
        """first: the persistent tokens, which every document's memory has read before its first token."""
        self.p, self.c, self.m = p, c, c.memory
        self.size = c.dim // self.m.heads
        self.coefficient = self.m.telescope_coefficient
        matrices = [p[f"weights.{layer}"] for layer in range(self.m.depth)]
        self.weights = [[w[h] for w in matrices] for h in range(self.m.heads)]
        self.surprise = [[torch.zeros_like(w) for w in head] for head in self.weights]
        self.before = {name: [torch.zeros(c.dim, dtype=torch.float64)] * (self.m.conv_size - 1) for name in "qkv"}
        self.start_chunks()
        for x in first:
            self.read(x)
        self.start_chunks()

    def start_chunks(self) -> None:
        """The next token opens a chunk, and forgetting from now on goes back to here."""
        self.origin, self.tokens = self.weights, 0

    def heads(self, x: Tensor) -> list[Tensor]:
        return [x[h * self.size : (h + 1) * self.size] for h in range(self.m.heads)]

    def projected(self, name: str, x: Tensor) -> list[Tensor]:
        """Projection, short convolution over this token's and the last ones', SiLU; per head."""
        self.before[name].append(self.p[f"{name}_proj.weight"] @ x)
        last = self.before[name][-self.m.conv_size :]
        taps = self.p[f"{name}_conv"]
        return self.heads(silu(sum(taps[:, i] * y for i, y in enumerate(last))))

    def gate(self, name: str, x: Tensor) -> list[list[Tensor]]:
        """Sigmoid of a linear map of the layer's input, per head and memory layer."""
        g = sigmoid(self.p[f"{name}_proj.weight"] @ x + self.p[f"{name}_proj.bias"])
        if self.m.per_layer_gates:
            return [[g[h * self.m.depth + layer] for layer in range(self.m.depth)] for h in range(self.m.heads)]
        return [[g[h]] * self.m.depth for h in range(self.m.heads)]

    def read(self, x: Tensor) -> Tensor:
        """Writes one token and reads after it."""
        if self.tokens % self.m.chunk_size == 0:
            # clones: the inner gradient is that of the weights as they stand, not of what the token owes to them
            self.anchor = [[w.clone() for w in head] for head in self.weights]
            self.chunk = [[] for _ in range(self.m.heads)]
        self.tokens += 1
        q, k, v = (self.projected(name, x) for name in "qkv")
        alpha, eta, theta = (self.gate(name, x) for name in ("forget", "momentum", "lr"))
        weights, surprise = [], []
        for h in range(self.m.heads):
            u = self.inner_gradient(h, unit(k[h]), v[h])
            steps = self.steps(h, k[h], v[h], eta[h], theta[h])
            w_h, s_h = [], []
            for layer in range(self.m.depth):
                momentum = self.m.max_momentum * eta[h][layer]
                s = momentum * self.surprise[h][layer] - steps[layer] * u[layer]
                towards = self.origin[h][layer] if self.m.forget_to == "initial" else 0
                w = self.weights[h][layer]
                w_h.append(towards + (1 - alpha[h][layer]) * (w - towards) + s)
                s_h.append(s)
            weights.append(w_h)
            surprise.append(s_h)
        self.weights, self.surprise = weights, surprise
        y = self.recall(q, weights) * sigmoid(self.p["g_proj.weight"] @ x)
        return self.p["o_proj.weight"] @ y

    def steps(self, h: int, k: Tensor, v: Tensor, eta: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
        """theta of each memory layer as the update takes it."""
        steps = []
        for layer in range(self.m.depth):
            step = plain = self.m.largest_lr * theta[layer] * presence(k)
            if self.m.step in ("telescoped", "relative"):
                for key, earlier in self.chunk[h]:
                    overlap = (key * unit(k)).sum() ** 2 if self.m.residual_norm else (key * unit(k)).sum().abs()
                    step = step * (1 - (self.coefficient * earlier[layer] * overlap).clamp(max=0.999))
                step = step * (1 - self.m.max_momentum * eta[layer])
            if self.m.step == "relative" and self.m.residual_norm:
                step = step / (1 + (v * v).sum()).sqrt()
            if self.m.residual_norm and self.m.damping and 0 < layer < self.m.depth - 1:
                step = (
                    step / self.weights[h][0].shape[1]
                )  # the input of a middle layer has about F times a key's square
            steps.append((plain, step))
        self.chunk[h].append((unit(k), [plain for plain, _ in steps]))
        return [step for _, step in steps]

    def inner_gradient(self, h: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Of |M(k) - v|^2 at the chunk's first weights; damped where the norm's input is small (docs/stability.md)."""
        weights = self.anchor[h]
        loss = (self.network(weights, k) - v).square().sum()
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        if not (self.m.residual_norm and self.m.damping):
            return gradient
        z = self.layers(weights, k)
        variance = (z - z.mean()).square().mean() + 1e-6
        scale = variance / (variance + self.m.damping * weights[-1].shape[0])
        return tuple(scale * u for u in gradient)

    def layers(self, weights: list[Tensor], x: Tensor) -> Tensor:
        for w in weights[:-1]:
            x = gelu(x @ w)
        return x @ weights[-1]

    def network(self, weights: list[Tensor], x: Tensor) -> Tensor:
        z = self.layers(weights, x)
        if not self.m.residual_norm:
            return z
        z = z - z.mean()
        return x + z / (z.square().mean() + 1e-6).sqrt()

    def recall(self, q: list[Tensor], weights: list[list[Tensor]]) -> Tensor:
        """M(q) at these weights, normalised per head, side by side; q per head."""
        read = [
            rms_norm(self.network(w, unit(x)), self.p["norm.weight"], self.c.norm_eps) * presence(x)
            for x, w in zip(q, weights, strict=True)
        ]
        return torch.cat(read)
