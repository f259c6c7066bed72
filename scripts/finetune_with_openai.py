"""From a file to an answer, with nothing but OpenAI's client: python finetune_with_openai.py FILE

Wants OPENAI_BASE_URL (http://127.0.0.1:8000/v1) and OPENAI_API_KEY.
"""

import sys
import time
from pathlib import Path

from openai import OpenAI


def main(path: Path, question: str) -> None:
    """Upload, train while telling what happens, ask the result and a checkpoint, clean up."""
    client = OpenAI()
    base = client.models.list().data[0].id
    file = client.files.create(file=path, purpose="fine-tune")
    client.files.wait_for_processing(file.id)
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, suffix="example")
    told: set[str] = set()
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed([*client.fine_tuning.jobs.list_events(job.id, limit=100)]):
            if event.id not in told:
                told.add(event.id)
                print(event.message)
    if job.fine_tuned_model is None:
        sys.exit(f"{job.status}: {job.error and job.error.message}")
    [*_, first] = client.fine_tuning.jobs.checkpoints.list(job.id)
    for model in (base, first.fine_tuned_model_checkpoint, job.fine_tuned_model):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=48,
            temperature=0,
        )
        print(f"{model}: {answer.choices[0].message.content}")
    print(client.files.content(job.result_files[0]).text)
    client.models.delete(job.fine_tuned_model)
    client.files.delete(file.id)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
