"""Modules of this folder run with each product where they say so."""

from __future__ import annotations

from tests.helpers.redis_products import product

__all__ = ["product"]
