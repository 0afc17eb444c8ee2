"""The cutoff of top-k, top-p and min-p on a GPU; ``jaxpaged.sampler_cutoff`` says what it is and chooses this one."""
