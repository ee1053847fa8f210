"""How weights move: parameter groups, MuonClip and AdamW, schedules, gradient clipping and QK-clip.

`config` has the settings, `build.build_optimizer` makes the optimizer, `schedule` moves its learning rates
and weight decay, `zclip` limits gradients before a step and `qk_clip` attention logits after it, `state`
carries the optimizer through a checkpoint.
"""
