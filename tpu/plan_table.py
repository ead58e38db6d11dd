"""tpu/PLANS.md, generated from the plans in tpu/plans/*.json."""


def build() -> str:
    """Writes it."""
    raise NotImplementedError
