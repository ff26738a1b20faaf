"""The promises of every tier, eviction policy, device and codec, as suites of tests to inherit (docs/extending.md).

tier     `TierContract`
policy   `EvictionPolicyContract`
device   `DeviceContract`
codec    `CodecContract`

They need pytest and hypothesis, which nothing else here does: import them from tests only.
"""
