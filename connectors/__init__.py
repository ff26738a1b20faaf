"""Engines plug in here.

vllm           a KV connector for vLLM
vllm_tier      a tier below vLLM's own offloading
transformers   a model with a cache behind it
base           what connectors have in common
"""
