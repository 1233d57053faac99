import pickle

import layercrit
from layercrit.study.executors import Asked, Executor, Part, Place, check_names, event_of, no_answer, steps


@layercrit.executor("inline")
class Inline(Executor):
    """This process, one task after the other, so that a debugger stops in it."""

    def __init__(self, rest, study, folder, n_workers):
        self.place = Place("cpu", n_threads=1)

    def run(self, tasks, start, answer=no_answer):
        """Run tasks and yield what happens."""
        check_names(tasks)
        work = start(self.place)
        for task in tasks:
            doing = steps(work, pickle.dumps(task))
            said = next(doing)
            while isinstance(said, Part | Asked):
                if isinstance(said, Asked):
                    said = doing.send(pickle.dumps(answer(task, pickle.loads(said.content))))
                else:
                    yield event_of(task, said)
                    said = next(doing)
            yield event_of(task, said)  # it is finished, or has failed
