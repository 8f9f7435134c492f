"""An exported model in the hands of other people's trainers: peft, transformers' Trainer, trl, accelerate."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.hf.configuration_titans import TitansConfig
from titans_pretrain.hf.export import export_model
from titans_pretrain.hf.modeling_titans import TitansForCausalLM
from titans_pretrain.models import build_model

pytestmark = pytest.mark.slow
VOCAB = 259
LENGTHS = (30, 12, 50, 7, 22, 41, 9, 33)


def make(tied=True, variant="mag", **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        variant=variant, dim=32, layers=2, heads=2, vocab_size=VOCAB, window=16, persistent_tokens=2, tie_embeddings=tied,
        memory=MemoryConfig(heads=2, chunk_size=8), mac=MacConfig(segment=16),
    )  # fmt: skip
    return TitansForCausalLM(TitansConfig.from_model_config(config, pad_token_id=258, **changes))


def texts():
    """Documents of unequal length, as token ids."""
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(4, 250, (n,), generator=random).tolist()} for n in LENGTHS]


def loss_alone(model):
    """Nats per predicted token of `texts`, each read by itself."""
    total = 0.0
    with torch.no_grad():
        for text in texts():
            ids = torch.tensor([text["input_ids"]])
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    return total / sum(n - 1 for n in LENGTHS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder, padding_side="right")


@pytest.mark.parametrize(
    "tied, targets", [(True, ["q_proj", "k_proj", "v_proj"]), (False, ["q_proj", "lm_head"]), (True, ["embed_tokens"])]
)
def test_lora_learns_and_merges(tied, targets):
    peft = pytest.importorskip("peft", reason="pip install 'titans-pretrain[downstream]'")
    base = make(tied).double()
    ids = torch.randint(4, 250, (2, 24))
    before = base(ids).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in adapters.items() if p.grad is None] == []
    # of a pair of factors the other one has no gradient while this one is zero
    zero = [p for name, p in adapters.items() if ".lora_B." in name or ".lora_embedding_A" in name]
    assert len(zero) == len(adapters) / 2 and all(p.grad.any() for p in zero)
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.1)
        model.eval()
        adapted = model(input_ids=ids).logits
        merged = model.merge_and_unload()(ids).logits
    assert (adapted - before).abs().max() > 0.01
    assert_close(merged, adapted, rtol=1e-8, atol=1e-8)


def trained(model, folder, data, **options):
    """transformers' Trainer over one step of all texts; the loss that it told."""
    pytest.importorskip("accelerate", reason="pip install 'titans-pretrain[downstream]'")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=1, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        learning_rate=1e-3, seed=0, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, **data)
    trainer.train()
    return next(log["loss"] for log in trainer.state.log_history if "loss" in log)


def test_a_step_of_the_trainer_does_not_depend_on_how_its_rows_are_batched(tokenizer, tmp_path):
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

    expected = loss_alone(make().eval())
    padded = {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False), "train_dataset": texts()}
    packed = {"data_collator": DataCollatorWithFlattening(), "train_dataset": texts()}
    for data in (padded, packed):
        for rows, steps in ((8, 1), (2, 4)):
            sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
            assert trained(make(), tmp_path, data, **sizes) == pytest.approx(expected, abs=2e-4)


def test_the_trainer_in_bfloat16_with_checkpointing(tokenizer, tmp_path):
    from transformers import DataCollatorForLanguageModeling

    data = {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False), "train_dataset": texts()}
    after = []
    for checkpointing in (False, True):
        model = make(variant="mac")
        loss = trained(
            model, tmp_path, data, bf16=True, gradient_checkpointing=checkpointing, per_device_train_batch_size=8
        )
        assert loss == pytest.approx(loss_alone(make(variant="mac").eval()), rel=0.01)
        after.append(model.model.embed_tokens.weight.detach())
    assert torch.equal(*after)
    assert not torch.equal(after[0], make(variant="mac").model.embed_tokens.weight)


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning_with_trl(packing, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'titans-pretrain[downstream]'")
    from datasets import Dataset

    model = make()
    expected = loss_alone(model.eval())
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
        disable_tqdm=True, max_steps=3, per_device_train_batch_size=8, max_length=256, learning_rate=1e-2, lr_scheduler_type="constant",
        packing=packing, seed=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(texts()), processing_class=tokenizer
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(expected, abs=1e-3)
    assert losses[-1] < losses[0] - 0.1


SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

folder, out, rows = sys.argv[1:]
random = torch.Generator().manual_seed(0)
texts = [{"input_ids": torch.randint(4, 250, (n,), generator=random).tolist()} for n in (30, 12, 50, 7, 22, 41, 9, 33)]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
arguments = TrainingArguments(out, max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
                              per_device_train_batch_size=int(rows), learning_rate=1e-3, seed=0)
trainer = Trainer(model, arguments, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), train_dataset=texts)
trainer.train()
if trainer.is_world_process_zero():
    torch.save({"world": trainer.args.world_size, "log": [x["loss"] for x in trainer.state.log_history if "loss" in x]}, out + "/losses.pt")
"""


def test_two_processes_of_accelerate_train_as_one(tmp_path):
    pytest.importorskip("accelerate", reason="pip install 'titans-pretrain[downstream]'")
    model = build_model(make().config.model_config())
    ByteTokenizer().save(tmp_path / "tokenizer")
    folder = export_model(model, make().config.model_config(), tmp_path / "tokenizer", tmp_path / "export")
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, str(tmp_path / "train.py"), str(folder), str(out), str(8 // processes)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=600)
        found.append(torch.load(out / "losses.pt"))
    assert [x["world"] for x in found] == [1, 2]
    assert found[1]["log"] == pytest.approx(found[0]["log"], abs=2e-4)
