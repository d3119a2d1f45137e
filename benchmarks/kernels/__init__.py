"""How fast is each kernel alone, and does it compile for GPUs that are not here?"""
