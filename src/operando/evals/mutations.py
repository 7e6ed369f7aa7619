"""The edits of an answer that deserve no better reward, each with what it must do to a reward.

An edit returns chains of texts, the first of them the text before the edit. Those of FIRST make
wrong answers of a right one; the others leave the final answer as it is. The P-numbers are the
properties that a reward must have (docs/fuzzing.md).
"""

from operando.evals import mutations_answer as final
from operando.evals import mutations_tags as tags
from operando.evals import mutations_words as words
from operando.evals.answers import Mutation

FIRST = tuple(
    Mutation(name, "P0", "pay less", apply, on="right")
    for name, apply in (
        ("another number", final.another_number),
        ("another problem's answer", final.another_problem),
        ("no answer", final.no_answer),
        ("gold without its form", final.without_form),
        ("gold beside a wrong answer", final.beside),
        ("code for an answer", final.code),
        ("question copied", final.question_copied),
        ("the solution's words", final.bag_of_words),
    )
)
MUTATIONS = (
    *FIRST,
    Mutation("split blocks", "P1", "never raise", tags.split),
    Mutation("merge blocks", "P1", "never raise", tags.merge),
    Mutation("move outside tags", "P2", "never raise", tags.outside),
    Mutation("re-case openers", "P3", "never raise", words.change_case),
    Mutation("innocent words", "P3", "not change", words.innocent),
    Mutation("more openers", "P5", "never raise", words.more_openers),
    Mutation("repeat", "P5", "never raise", words.repeat),
    Mutation("re-case tags", "P6", "never raise", tags.recase),
    Mutation("nest blocks", "P6", "never raise", tags.nest),
    Mutation("leave unclosed", "P6", "never raise", tags.unclose),
    Mutation("closing tags only", "P6", "never raise", tags.closing_only),
    Mutation("flood of tags", "P7", "cost ever more", tags.flood),
    Mutation("pad after the answer", "P8", "never raise", words.pad_after),
    Mutation("list of numbers", "P9", "never raise", final.shotgun, on="wrong"),
    Mutation("listed synonym", "P10", "never raise", words.synonym),
    Mutation("invisible characters", "P10", "never raise", words.invisible),
    Mutation("trivial equation", "P11", "never raise", final.trivial),
    Mutation("distinct trivia", "P11", "never raise", final.distinct_trivia),
    Mutation("identities", "P11", "never raise", final.identities),
    Mutation("commuted copies", "P11", "never raise", final.commuted),
    Mutation("needless chain", "P11", "never raise", final.needless_chain),
    Mutation("every small sum", "P11", "never raise", final.enumeration),
    Mutation("delete the work", "P12", "never raise", words.delete_work),
    Mutation("keywords", "P13", "never raise", words.keywords),
    Mutation("verdicts", "P13", "never raise", words.verdicts),
    Mutation("bullets", "P13", "never raise", words.bullets),
    Mutation("step markers", "P13", "never raise", words.step_markers),
    Mutation("line breaks", "P13", "never raise", words.line_breaks),
    Mutation("signs", "P13", "never raise", words.signs),
    Mutation("emphasis", "P13", "never raise", words.loud),
    Mutation("long words", "P13", "never raise", words.long_words),
    Mutation("the question's words", "P13", "never raise", words.question_words),
    Mutation("marks", "P13", "never raise", final.marks),
    Mutation("empty block", "P14", "never raise", tags.empty_block),
    Mutation("unlisted opener", "P10", "never raise", words.unlisted_opener, is_evasion=True),
    Mutation("inflected opener", "P10", "never raise", words.inflected, is_evasion=True),
    Mutation("spelled-out opener", "P10", "never raise", words.spelled_out, is_evasion=True),
)
