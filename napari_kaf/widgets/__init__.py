"""The panels: Finetune, Pretrain, Segment."""
