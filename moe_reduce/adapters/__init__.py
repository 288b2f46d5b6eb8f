"""Base + adapter -> adapted model: low-rank changes that train beside a frozen base and merge into it exactly."""
