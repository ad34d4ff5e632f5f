"""QLoRA for every LightningModule in one argument."""
