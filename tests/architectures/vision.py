"""Convolution networks, speech encoders and a recommender, from a config with random weights."""

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.architectures.support import LOOKUP, NOTHING, Architecture, floats, ids, like


def resnet18():
    """Basic blocks, as in ResNet-18: two of them in each of four stages."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def resnet50():
    """Bottleneck blocks, as in ResNet-50."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[1, 2, 2, 1], layer_type="bottleneck", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet():
    """Depthwise separable convolutions."""
    config = transformers.MobileNetV1Config(
        image_size=64, depth_multiplier=0.25, min_depth=16, num_labels=10, classifier_dropout_prob=0.0
    )
    return transformers.MobileNetV1ForImageClassification(config)


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], image_size=64, num_labels=10
    )
    return transformers.ConvNextForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=25,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    return transformers.WhisperModel(config)


def wav2vec2():
    """Its positions come from a grouped, weight-normed convolution."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16, 32),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    return transformers.Wav2Vec2Model(config)


class UNet(nn.Module):
    """Two levels down by strided convolutions, up by transposed ones, with skips."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.down1 = nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(32, 48, 4, stride=2, padding=1)
        self.middle = nn.Conv2d(48, 48, 3, padding="same", padding_mode="reflect", dilation=2)
        self.up2 = nn.ConvTranspose2d(48, 32, 4, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 16, 3, stride=2, padding=1)
        self.leave = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        first = F.relu(self.enter(x))
        second = F.relu(self.down1(first))
        third = F.relu(self.down2(second))
        third = F.relu(self.middle(third))
        up = torch.cat([F.relu(self.up2(third)), second], dim=1)
        up = torch.cat([F.relu(self.up1(up, output_size=first.shape[-2:])), first], dim=1)
        return self.leave(up)


class Recommender(nn.Module):
    """In the style of DLRM: bags of categories, dense features, their products, a perceptron on top."""

    sizes = (500, 300, 40)

    def __init__(self, width=16):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(size, width, mode="sum") for size in self.sizes)
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, features, values, offsets):
        x = self.bottom(features)
        parts = torch.stack([x, *(bag(v, offsets) for bag, v in zip(self.bags, values, strict=True))], dim=1)
        rows, columns = torch.triu_indices(4, 4, 1)
        return self.top(torch.cat([x, (parts @ parts.mT)[:, rows, columns]], dim=1))


def _call_recommender(model):
    values = [ids(1, 12, size)[0] for size in model.sizes]
    return model(like(model, floats(4, 13)), values, torch.tensor([0, 3, 3, 7]))


def _call_whisper(model):
    return model(like(model, floats(2, 16, 50)), decoder_input_ids=ids(length=5)).last_hidden_state


def _resnet(stages, parts):
    """The convolutions of a ResNet's blocks."""
    names = set()
    for stage, depth in enumerate(stages):
        for layer in range(depth):
            prefix = f"resnet.encoder.stages.{stage}.layers.{layer}"
            names |= {f"{prefix}.layer.{part}.convolution" for part in range(parts)}
    return names


def _shortcuts(stages):
    return {f"resnet.encoder.stages.{stage}.layers.0.shortcut.convolution" for stage in stages}


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
CROSS = [part.replace("self_attn", "encoder_attn") for part in ATTENTION]

ARCHITECTURES = {
    "resnet18": Architecture(
        resnet18,
        lambda model: model(like(model, floats(4, 3, 64, 64))).logits,
        _resnet([2, 2, 2, 2], 2) | _shortcuts([1, 2, 3]) | {"resnet.embedder.embedder.convolution", "classifier.1"},
    ),
    "resnet50": Architecture(
        resnet50,
        lambda model: model(like(model, floats(4, 3, 64, 64))).logits,
        _resnet([1, 2, 2, 1], 3) | _shortcuts([0, 1, 2, 3]) | {"resnet.embedder.embedder.convolution", "classifier.1"},
    ),
    "mobilenet": Architecture(
        mobilenet,
        lambda model: model(like(model, floats(4, 3, 64, 64))).logits,
        {f"mobilenet_v1.layer.{k}.convolution" for k in range(1, 26, 2)}
        | {"mobilenet_v1.conv_stem.convolution", "classifier"},
        {f"mobilenet_v1.layer.{k}.convolution": NOTHING for k in range(0, 26, 2)},
    ),
    "convnext": Architecture(
        convnext,
        lambda model: model(like(model, floats(2, 3, 64, 64))).logits,
        {f"convnext.encoder.stages.{s}.downsampling_layer.1" for s in range(1, 4)}
        | {
            f"convnext.encoder.stages.{s}.layers.{k}.pwconv{n}"
            for s, depth in enumerate([1, 1, 2, 1])
            for k in range(depth)
            for n in (1, 2)
        }
        | {"convnext.embeddings.patch_embeddings", "classifier"},
        {
            f"convnext.encoder.stages.{s}.layers.{k}.dwconv": NOTHING
            for s, depth in enumerate([1, 1, 2, 1])
            for k in range(depth)
        },
    ),
    "whisper": Architecture(
        whisper,
        _call_whisper,
        {"encoder.conv1", "encoder.conv2"}
        | {f"encoder.layers.0.{part}" for part in [*ATTENTION, "fc1", "fc2"]}
        | {f"decoder.layers.0.{part}" for part in [*ATTENTION, *CROSS, "fc1", "fc2"]},
        {
            "encoder.embed_positions": LOOKUP,
            "decoder.embed_tokens": LOOKUP,
            "decoder.embed_positions": "parametrized: WhisperPositionalEmbedding replaces the forward",
        },
    ),
    "wav2vec2": Architecture(
        wav2vec2,
        lambda model: model(like(model, floats(2, 800))).last_hidden_state,
        {f"feature_extractor.conv_layers.{k}.conv" for k in range(3)}
        | {"feature_projection.projection"}
        | {f"encoder.layers.0.attention.{part}_proj" for part in ["q", "k", "v", "out"]}
        | {f"encoder.layers.0.feed_forward.{part}_dense" for part in ["intermediate", "output"]},
        {"encoder.pos_conv_embed.conv": "parametrized: its weight is computed from other tensors"},
    ),
    "unet": Architecture(
        UNet,
        lambda model: model(like(model, floats(2, 3, 20, 12))),
        {"enter", "down1", "down2", "middle", "up1", "up2", "leave"},
    ),
    "recommender": Architecture(
        Recommender,
        _call_recommender,
        {"bottom.0", "bottom.2", "top.0"},
        {"bags.0": LOOKUP, "bags.1": LOOKUP, "bags.2": LOOKUP, "top.2": NOTHING},
    ),
}
