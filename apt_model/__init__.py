"""Curriculum-trained mixture-of-experts language models: schedule, layers, data, training."""
