"""Fine-tune a causal language model: vanilla, with LoRA, or with subquadratic MLP layers.

    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \\
        recipes/finetune_lm.py --config recipes/llama-3.2-1b-subquad.yaml

Try any recipe first with --dry-run. `--set learning_rate=1e-4 max_steps=50` replaces settings of the file.
"""

from collections.abc import Sequence
from typing import Any

from data import load_rows
from lm_data import NO_LOSS, answer_accuracy, make_sequences, predicted_tokens
from methods import apply_method
from settings import LmSettings, parse_settings
from training import (
    check_max_length,
    checkpoint_to_resume,
    count_parameters,
    describe_parameters,
    describe_results,
    evaluate,
    load_tokenizer,
    model_options,
    run_script,
    save_plain,
    say,
    training_arguments,
    write_results,
)
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, set_seed


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    # Settings
    settings = parse_settings(LmSettings, argv, __doc__)
    arguments = training_arguments(settings, prediction_loss_only=not settings.answer_accuracy)
    checkpoint = checkpoint_to_resume(settings)
    set_seed(settings.seed)

    # Model and tokenizer
    tokenizer = load_tokenizer(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.model, **model_options(settings))
    check_max_length(settings, model.config)
    use_cache = model.config.use_cache

    # Data
    with arguments.main_process_first():
        train = make_sequences(load_rows(settings, "train"), tokenizer, settings)
        evaluation = make_sequences(load_rows(settings, "eval"), tokenizer, settings)
    say(arguments, f"train: {train.summary}\neval: {evaluation.summary}")

    # Method: must come before the Trainer, which hands the trainable weights to the optimizer
    model, callbacks = apply_method(
        model,
        settings.method,
        rank=settings.rank,
        alpha=settings.alpha,
        subquad=settings.subquad_config(),
        rest=settings.rest,
        plan=settings.plan,
    )

    # Training
    metrics: dict[str, Any] = {}
    if settings.answer_accuracy:
        metrics = {"compute_metrics": answer_accuracy, "preprocess_logits_for_metrics": predicted_tokens}
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train.dataset,
        eval_dataset=evaluation.dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS),  # pads to the longest
        callbacks=callbacks,
        **metrics,
    )
    counts = count_parameters(model)
    say(arguments, describe_parameters(counts, settings.method))
    trained = trainer.train(resume_from_checkpoint=checkpoint)

    # Results
    scores = evaluate(trainer, settings.method)
    folder = save_plain(trainer, tokenizer, use_cache)
    results = write_results(trainer, settings, trained.metrics, counts | scores, folder)
    say(arguments, describe_results(results))
    return results


if __name__ == "__main__":
    run_script(main)
