"""What NUTS and many chains share: trajectories, their state machines, what warm-up learns."""

__all__: list[str] = []
