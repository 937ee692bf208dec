"""Code of the brain_t1_vae bundle that MONAI has not; the JSON files in configs/ put it together."""
