"""A suite: many tasks, every way to compose their adapters, measured on the same texts.

workbench.py reads tasks and texts once; modules.py holds adapters in training or frozen; heads.py the tasks' heads;
joint.py trains adapters together under weights; the methods are in training/composing/ (ours) and training/baselines/.
"""
