"""The published networks, slowly and literally: what our import of their weights is compared with.

Written from the description of the published implementation alone, for equal keypoint counts, square
slices and integer positions; module names are chosen so that the state dict has its keys. Nothing here is
shared with the product.
"""

import torch
from torch import nn

HEADS = 4


def convolution_block(channels_in, channels):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.LeakyReLU(0.01)
    )


def pointwise(widths):
    """Convolutions with a kernel of one over (B, C, N), batch normalisation and ReLU between them."""
    layers = []
    for index in range(1, len(widths)):
        layers.append(nn.Conv1d(widths[index - 1], widths[index], 1))
        if index < len(widths) - 1:
            layers += [nn.BatchNorm1d(widths[index]), nn.ReLU()]
    return nn.Sequential(*layers)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.merge = nn.Conv1d(width, width, 1)
        self.proj = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, x, source):
        query, key, value = self.proj[0](x), self.proj[1](source), self.proj[2](source)
        message = torch.zeros_like(query)
        for head in range(HEADS):
            channels = slice(head, None, HEADS)  # channel c belongs to head c mod 4
            q, k, v = query[:, channels], key[:, channels], value[:, channels]
            scores = q.transpose(1, 2) @ k / q.shape[1] ** 0.5  # (B, N, M)
            message[:, channels] = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
        return self.merge(message)


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.mlp = pointwise([2 * width, 2 * width, width])

    def forward(self, x, source):
        return x + self.mlp(torch.cat([x, self.attn(x, source)], dim=1))


class PositionCode(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = pointwise([2, 32, 64, 128, width, width])


class Layers(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(blocks))


class Graph(nn.Module):
    """The part named "superglue": in a KAF layer all attention is self-attention; in the matcher it alternates."""

    def __init__(self, width, blocks):
        super().__init__()
        self.kenc = PositionCode(width)
        self.gnn = Layers(width, blocks)
        self.final_proj = nn.Conv1d(width, width, 1)
        self.bin_score = nn.Parameter(torch.tensor(1.0))

    def code(self, positions, size):
        scaled = (positions.float() - size / 2) / (0.7 * size)  # (B, N, 2)
        return self.kenc.encoder(scaled.transpose(1, 2))


class KafLayer(nn.Module):
    def __init__(self, channels, width, blocks, diffusion):
        super().__init__()
        self.feature_mlp = nn.Conv1d(channels, width, 1)
        self.superglue = Graph(width, blocks)
        self.diffusion_cnn = nn.Sequential(
            nn.Conv2d(width, diffusion, 3, padding=1),
            nn.BatchNorm2d(diffusion),
            nn.ReLU(),
            nn.Conv2d(diffusion, channels, 3, padding=1),
        )

    def forward(self, features, keypoints, level):
        batch, _, size, width = features.shape
        assert size == width
        cells = keypoints // 2**level
        gathered = torch.stack([features[b][:, cells[b, :, 0], cells[b, :, 1]] for b in range(batch)])
        x = self.feature_mlp(gathered) + self.superglue.code(cells, size)
        for layer in self.superglue.gnn.layers:
            x = layer(x, x)
        spread = x.new_zeros(batch, x.shape[1], size, size)
        for b in range(batch):
            for n in range(x.shape[2]):
                spread[b, :, cells[b, n, 0], cells[b, n, 1]] = x[b, :, n]  # the last writer wins
        return torch.cat([features, self.diffusion_cnn(spread)], dim=1), x


class Encoder(nn.Module):
    def __init__(self, f, width, blocks, diffusion):
        super().__init__()
        channels_in = 1
        for level in range(1, 5):
            channels = f * 2 ** (level - 1)
            self.add_module(f"contr_{level}_1", convolution_block(channels_in, channels))
            self.add_module(f"contr_{level}_2", convolution_block(channels, channels))
            self.add_module(f"graph_{level}", KafLayer(channels, width, blocks, diffusion))
            channels_in = 2 * channels
        self.center = nn.Sequential(
            nn.Conv2d(16 * f, 32 * f, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32 * f, 32 * f, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, images, keypoints):
        maps, keypoint_features, x = [], [], images
        for level in range(1, 5):
            x = getattr(self, f"contr_{level}_2")(getattr(self, f"contr_{level}_1")(x))
            x, u = getattr(self, f"graph_{level}")(x, keypoints, level - 1)
            maps.append(x)
            keypoint_features.append(u)
            x = nn.functional.max_pool2d(x, 2)
        return self.center(x), maps, keypoint_features


class Decoder(nn.Module):
    def __init__(self, f, num_classes):
        super().__init__()
        for level in (4, 3, 2, 1):
            channels = 2 * f * 2 ** (level - 1)
            self.add_module(f"upscale{level + 1}", nn.ConvTranspose2d(2 * channels, channels, 2, stride=2))
            self.add_module(f"expand_{level}_1", convolution_block(2 * channels, channels))
            self.add_module(f"expand_{level}_2", convolution_block(channels, channels))
        self.head = nn.Sequential(nn.Conv2d(2 * f, num_classes, 1, bias=False))

    def forward(self, x, maps):
        for level in (4, 3, 2, 1):
            x = torch.cat([getattr(self, f"upscale{level + 1}")(x), maps[level - 1]], dim=1)
            x = getattr(self, f"expand_{level}_2")(getattr(self, f"expand_{level}_1")(x))
        return self.head(x)


class SegmentationReference(nn.Module):
    def __init__(self, *, f, num_classes, width=256, blocks=2, diffusion=64):
        super().__init__()
        self.encoder = Encoder(f, width, blocks, diffusion)
        self.decoder = Decoder(f, num_classes)

    def forward(self, images, keypoints):
        centre, maps, _ = self.encoder(images, keypoints)
        return self.decoder(centre, maps)


class PretrainingReference(nn.Module):
    def __init__(self, *, f, width=256, blocks=2, diffusion=64, projection=512):
        super().__init__()
        self.encoder = Encoder(f, width, blocks, diffusion)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32 * f, 16 * f),
            nn.ReLU(),
            nn.Linear(16 * f, projection),
        )
        self.graph_feature_mlp = nn.Conv1d(4 * width, width, 1)
        self.graph_head = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, projection)
        )
        self.graph_local_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.superglue = Graph(width, 4)

    def forward(self, images, keypoints):
        """Embeddings c and g of each slice, and matching scores of the first half with the second."""
        centre, _, keypoint_features = self.encoder(images, keypoints)
        local = self.graph_feature_mlp(torch.cat(keypoint_features, dim=1))  # (B, E, N)
        pairs = len(images) // 2
        x = local + self.superglue.code(keypoints, images.shape[-1])
        x0, x1 = x[:pairs], x[pairs:]
        for index, layer in enumerate(self.superglue.gnn.layers):
            if index % 2 == 0:
                x0, x1 = layer(x0, x0), layer(x1, x1)
            else:
                x0, x1 = layer(x0, x1), layer(x1, x0)
        x0, x1 = self.superglue.final_proj(x0), self.superglue.final_proj(x1)
        scores = x0.transpose(1, 2) @ x1 / x0.shape[1] ** 0.5
        return self.head(centre), self.graph_head(local.mean(2)), scores
