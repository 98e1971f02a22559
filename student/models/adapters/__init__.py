"""LoRA adapters as peft keeps them: their files, what a job asks of one, and their attachment to a model.

Not here: the training of one (`student.training`), and the loading of whole models (`student.models`).
"""
