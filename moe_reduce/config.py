"""Configurations, under the name that configuration files of earlier versions import."""

from moe_reduce.core.config import *  # noqa: F403
