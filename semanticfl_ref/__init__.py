"""SemanticFL: federated learning guided by a frozen diffusion model, as a compact reference."""

__version__ = "0.1.0"
