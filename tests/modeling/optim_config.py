"""The optimizer of small students in tests."""

OPTIM = {
    "lr": 1e-3,
    "lr_batch_size": 8,
    "weight_decay": 0.05,
    "layer_decay": 1.0,
    "label_smoothing": 0.1,
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True},
    "scheduler": {"_target_": "facemask.modeling.optim.warmup_cosine", "_partial_": True},
}
