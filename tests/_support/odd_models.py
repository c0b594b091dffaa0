"""Small classifiers whose features lie on the image in ways that a shape does not tell."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Tokens(nn.Module):
    """A transformer over patches of 8 px, without positions: tokens may stand in any order.

    ``before`` and ``behind`` are tokens of no place, all read from one bank; ``views`` is what it does to the
    image first.
    """

    def __init__(self, before=1, behind=0, *, sequence_first=False, depth=2, view=None):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.sequence_first, self.view = before, sequence_first, view
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.bank = nn.Parameter(torch.randn(before + behind, 32))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(32, 2, 64, batch_first=not sequence_first, norm_first=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)
        self.eval()

    def forward(self, images):
        images = self.view(images) if self.view else images
        places = self.patches(images).flatten(2).mT
        bank = self.bank.expand(len(images), -1, -1)
        tokens = torch.cat([bank[:, : self.before], places, bank[:, self.before :]], 1)
        if self.sequence_first:
            return self.head(self.norm(self.blocks(tokens.transpose(0, 1))).mean(0))
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Planes(nn.Module):
    """Convolutions, strides (rows, columns) each, and a mean over places."""

    def __init__(self, strides=(2, 2), channels=16, view=None):
        super().__init__()
        torch.manual_seed(0)
        self.view = view
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, strides, 1), nn.ReLU(), nn.Conv2d(8, channels, 3, strides, 1), nn.ReLU()
        )
        self.head = nn.Linear(channels, 5)
        self.eval()

    def forward(self, images):
        images = self.view(images) if self.view else images
        return self.head(self.features(images).mean((2, 3)))


class Flattened(nn.Module):
    """Patches mixed by convolutions of one axis: tokens with their channels first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.mix = nn.Sequential(nn.GELU(), nn.Conv1d(24, 24, 1), nn.GELU())
        self.head = nn.Linear(24, 5)
        self.eval()

    def forward(self, images):
        return self.head(self.mix(self.patches(images).flatten(2)).mean(2))


class Queries(nn.Module):
    """36 learned queries ask the patches: as many as a grid of 6 x 6, but no places at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.asked = nn.Parameter(torch.randn(36, 32))
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)
        self.eval()

    def forward(self, images):
        places = self.patches(images).flatten(2).mT
        answers = self.attention(self.asked.expand(len(images), -1, -1), places, places)[0]
        return self.head(self.norm(answers).mean(1))


class Recurrent(nn.Module):
    """Looks at the whole image 36 times: as many steps as a grid of 6 x 6, but no places at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cell = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 5)
        self.eval()

    def forward(self, images):
        seen = self.patches(images).mean((2, 3))
        return self.head(self.cell(seen[:, None].expand(-1, 36, -1))[0].mean(1))


class Views(nn.Module):
    """The mean over several views of an image, as test-time augmentation takes it."""

    def __init__(self, net, *views):
        super().__init__()
        self.net, self.views = net, views
        self.eval()

    def forward(self, images):
        return sum(self.net(view(images)) for view in self.views) / len(self.views)


class Adapted(nn.Module):
    """A linear layer with a correction of rank 2 that is still zero: LoRA as peft, or by bare products."""

    def __init__(self, base, bare=False):
        super().__init__()
        self.base, self.bare = base, bare
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        if bare:
            self.weight, self.bias = base.weight, base.bias
            self.factor = nn.Parameter(self.up.weight @ self.down.weight)
            del self.base, self.down, self.up

    def forward(self, x):
        if self.bare:
            return x @ (self.weight + self.factor).mT + self.bias
        return self.base(x) + self.up(self.down(x))


class ClassToken(nn.Module):
    """A transformer of two blocks, its attention written out, that reads its answer from a class token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.ModuleList(nn.ModuleDict(self.block()) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)
        self.eval()

    @staticmethod
    def block():
        linear = {name: nn.Linear(32, 32) for name in ("query", "key", "value", "out")}
        for layer in linear.values():
            nn.init.normal_(layer.weight, std=0.3)
        return {"norm": nn.LayerNorm(32), **linear}

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            read = block["norm"](tokens)
            query, key, value = (block[name](read)[:, None] for name in ("query", "key", "value"))
            tokens = tokens + block["out"](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return self.head(self.norm(tokens)[:, 0])


def squared(images):
    """Resized to a square inside."""
    return F.interpolate(images, (64, 64), mode="bilinear", antialias=True)


def cropped(images):
    """The middle three quarters."""
    height, width = images.shape[2:]
    return images[:, :, height // 8 : -height // 8, width // 8 : -width // 8]


def padded(images):
    """On a ground of twice its height."""
    return F.pad(images, (0, 0, images.shape[2], 0))
