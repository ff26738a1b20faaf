"""`kvstore demo`: a real model answers over a long prompt, and its KV comes back from every tier.

script                                  the play
report, plot, explain                   what it showed
models, hub, gguf_model, random_model   which model
replica, replica_process                who answers
text                                    the prompts
"""
