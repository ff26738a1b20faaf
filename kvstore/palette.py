"""One colour per tier, in every picture, table and page.

Blue, orange and green of Okabe and Ito's set, which people who see few colours tell apart; what is no tier takes none
of the three. The dashboard's style sheet and Grafana's board hold the same values: a test compares them.
"""

from __future__ import annotations

HOST, DISK, REDIS = "#0072b2", "#d98c00", "#008a63"
COMPUTED = "#8a94a0"  # tokens that came from nowhere: grey
TIERS = {"host": HOST, "disk": DISK, "redis": REDIS}

# The same three as a terminal names them; "engines" is whoever is attached.
TERMINAL = {"host": "blue", "disk": "yellow", "redis": "green", "engines": "magenta"}

INK, SOFT, GRID, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
WITHOUT = "#ccd3da"  # the same prompt without the store
BAD = "#b8420b"
