"""Training: LightningModules, callbacks and the curriculum; all of them receive built objects, never configs."""
