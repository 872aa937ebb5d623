"""Images under every class's caption: FedDifRC's text-driven keys, from the U-Net on."""

import torch

from semanticfl_ref.diffusion.text import captions

OPTIONS = {"timestep": 150, "seed": 3}


def test_every_caption_of_every_image(backbone, text_encoder, images, monkeypatch):
    """Equals a pass of all images under each caption, with a single pass through the VAE."""
    hidden = text_encoder.encode(captions("a photo of a {}", ["one", "two", "three"]))[0]
    each = [backbone.features(images, prompt_embedding=h, **OPTIONS) for h in hidden]
    encoded, encode = [], backbone.vae.encode
    monkeypatch.setattr(backbone.vae, "encode", lambda x: encoded.append(x) or encode(x))
    found = backbone.features(images, prompt_embedding=hidden, every_caption=True, **OPTIONS)
    assert len(encoded) == 1
    for layer, values in found.items():
        assert torch.equal(values, torch.stack([one[layer] for one in each], 1))
    assert not torch.allclose(found["up.0"][:, 0], found["up.0"][:, 1], rtol=1e-4, atol=1e-4)
