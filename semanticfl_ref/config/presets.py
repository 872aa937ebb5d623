"""The data sets of the package, and the settings whose defaults differ with each.

The presets of the embedded data sets were chosen on their validation images.
"""

from semanticfl_ref.config.registry import register_dataset

# With the embedded diffusion model, whose layers are fewer and narrower than Stable Diffusion's.
TINY_MODEL = {
    "diffusion.layers": "mid",
    "diffusion.vae_pool": 4,
    "diffusion.pooling": "mean",
    "diffusion.timestep": 20,
    "diffusion.input_size": 0,
    "diffusion.precision": "fp32",
    "anchors.width": 96,
    "anchors.whiten": False,
    "anchors.aggregation": "equal",
}
EMBEDDED = {
    **TINY_MODEL,
    "data.augment": False,
    "partition.alpha": 0.3,
    "diffusion.source": "tiny",
    "model.width": 16,
    "federation.rounds": 40,
    "federation.local_epochs": 10,
    "federation.batch_size": 32,
    "federation.learning_rate": 0.1,
    "semanticfl.consistency": "cosine",
    "semanticfl.lambda_kd": 20.0,
    "semanticfl.lambda_con": 0.1,
    "fedcda.warm_up": 10,
    "feddifrc.keys": "class-mean",
}

# By client optimizer; the data sets' rates are those of SGD.
OPTIMIZERS = {name: {"federation.learning_rate": 0.001} for name in ("adam", "adamw")}

NID2_CLIENTS = 6  # five biased ones, which hold a fifth of the classes each, and one unbiased

register_dataset("digit-scenes", "semanticfl_ref.data.digits:read", EMBEDDED)
register_dataset("digits", "semanticfl_ref.data.digits:read", EMBEDDED)
register_dataset("synthetic", "semanticfl_ref.data.synthetic:read")
register_dataset("cifar10", "semanticfl_ref.data.cifar:read")
register_dataset("cifar100", "semanticfl_ref.data.cifar:read", {"federation.weight_decay": 1e-4})
register_dataset(
    "tinyimagenet",
    "semanticfl_ref.data.tinyimagenet:read",
    {"federation.weight_decay": 1e-4},
)
# The user's own: with the weights that the embedded data sets' validation images chose.
_OWN = {name: value for name, value in EMBEDDED.items() if name.startswith("semanticfl.")}
_SCALED = {"data.image_size": 32, **_OWN}
register_dataset("image_folder", "semanticfl_ref.data.image_folder:read", _SCALED)
register_dataset("parquet", "semanticfl_ref.data.parquet:read", _SCALED)
register_dataset("npz", "semanticfl_ref.data.arrays:read_npz", _OWN)
# MNIST and its like: digits, letters and clothes, which flips would change.
register_dataset("idx", "semanticfl_ref.data.arrays:read_idx", {"data.augment": False, **_OWN})
