"""Run by test_hosts under torchrun: `save_again.py STRATEGY BASE CHECKPOINT COPY` resumes and saves before a step."""

import sys
from datetime import timedelta

from lightning.pytorch import Callback, Trainer

from lightning_qlora import QLoRAPrecision

sys.path.insert(0, "examples")
from docstring_qa import DocstringQA
from machines import MODULES, from_environment, make_strategy

strategy, base, checkpoint, copy = sys.argv[1:]


class Save(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(copy)
        trainer.should_stop = True


machines = from_environment("GROUP_WORLD_SIZE")
processes = from_environment("LOCAL_WORLD_SIZE")
trainer = Trainer(
    plugins=QLoRAPrecision(r=16, lora_alpha=16),
    strategy=make_strategy(strategy, machines * processes, timedelta(minutes=10)),
    num_nodes=machines,
    devices=processes,
    logger=False,
    enable_checkpointing=False,
    callbacks=Save(),
)
trainer.fit(MODULES[strategy](base), DocstringQA(base, batch_size=4), ckpt_path=checkpoint)
