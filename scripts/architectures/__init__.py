"""Every architecture of the installed transformers, tiny: is its MLP made sparse, and is the result right?"""
