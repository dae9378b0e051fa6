"""Fine-tune a sequence classifier: vanilla, with LoRA, or with subquadratic MLP layers.

    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \\
        recipes/finetune_classifier.py --config recipes/bert-base-subquad.yaml

Try any recipe first with --dry-run. `--set learning_rate=1e-4 max_steps=50` replaces settings of the file.
"""

from collections.abc import Sequence
from typing import Any

from classifier_data import find_labels, make_examples
from data import load_rows
from methods import apply_method
from settings import ClassifierSettings, parse_settings
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
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    set_seed,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    # Settings
    settings = parse_settings(ClassifierSettings, argv, __doc__)
    arguments = training_arguments(settings)
    checkpoint = checkpoint_to_resume(settings)
    set_seed(settings.seed)

    # Data
    tokenizer = load_tokenizer(settings)
    train_rows, eval_rows = load_rows(settings, "train"), load_rows(settings, "eval")
    labels = find_labels(train_rows, settings)
    with arguments.main_process_first():
        train = make_examples(train_rows, labels, tokenizer, settings)
        evaluation = make_examples(eval_rows, labels, tokenizer, settings)
    say(
        arguments,
        f"train: {train_rows.source}: {len(train)} rows\neval: {eval_rows.source}: {len(evaluation)} rows",
    )
    say(arguments, f"classes: {', '.join(labels.names)}")

    # Model
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model,
        id2label=dict(enumerate(labels.names)),
        label2id={name: number for number, name in enumerate(labels.names)},
        **model_options(settings),
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it
    check_max_length(settings, model.config)
    use_cache = model.config.use_cache

    # Method: must come before the Trainer, which hands the trainable weights to the optimizer
    model, callbacks = apply_method(
        model,
        settings.method,
        rank=settings.rank,
        alpha=settings.alpha,
        subquad=settings.subquad_config(),
        rest=settings.rest,
        plan=settings.plan,
        task_type="SEQ_CLS",
    )

    # Training
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorWithPadding(tokenizer),  # pads to the longest of a batch
        compute_metrics=accuracy,
        callbacks=callbacks,
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


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    run_script(main)
