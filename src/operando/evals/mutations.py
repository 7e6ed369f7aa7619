"""The edits of an answer that deserve no better pay, each with what it must do to a reward.

An edit returns chains of texts, the first of them the text before the edit. Those of FIRST make
wrong answers of a right one; the others leave the final answer as it is. The P-numbers are the
properties that a reward must have (docs/fuzzing.md).
"""

from operando.evals import mutations_answer as final
from operando.evals import mutations_tags as tags
from operando.evals import mutations_words as words
from operando.evals.answers import Edit

FIRST = tuple(
    Edit(name, "P0", "pay less", apply, on="right")
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
EDITS = (
    *FIRST,
    Edit("split blocks", "P1", "never raise", tags.split),
    Edit("merge blocks", "P1", "never raise", tags.merge),
    Edit("move outside tags", "P2", "never raise", tags.outside),
    Edit("re-case openers", "P3", "never raise", words.change_case),
    Edit("innocent words", "P3", "not change", words.innocent),
    Edit("more openers", "P5", "never raise", words.more_openers),
    Edit("repeat", "P5", "never raise", words.repeat),
    Edit("re-case tags", "P6", "never raise", tags.recase),
    Edit("nest blocks", "P6", "never raise", tags.nest),
    Edit("leave unclosed", "P6", "never raise", tags.unclose),
    Edit("closing tags only", "P6", "never raise", tags.closing_only),
    Edit("flood of tags", "P7", "cost ever more", tags.flood),
    Edit("pad after the answer", "P8", "never raise", words.pad_after),
    Edit("list of numbers", "P9", "never raise", final.shotgun, on="wrong"),
    Edit("listed synonym", "P10", "never raise", words.synonym),
    Edit("invisible characters", "P10", "never raise", words.invisible),
    Edit("trivial equation", "P11", "never raise", final.trivial),
    Edit("distinct trivia", "P11", "never raise", final.distinct_trivia),
    Edit("identities", "P11", "never raise", final.identities),
    Edit("commuted copies", "P11", "never raise", final.commuted),
    Edit("needless chain", "P11", "never raise", final.needless_chain),
    Edit("every small sum", "P11", "never raise", final.enumeration),
    Edit("delete the work", "P12", "never raise", words.delete_work),
    Edit("keywords", "P13", "never raise", words.keywords),
    Edit("verdicts", "P13", "never raise", words.verdicts),
    Edit("bullets", "P13", "never raise", words.bullets),
    Edit("step markers", "P13", "never raise", words.step_markers),
    Edit("line breaks", "P13", "never raise", words.line_breaks),
    Edit("signs", "P13", "never raise", words.signs),
    Edit("emphasis", "P13", "never raise", words.loud),
    Edit("long words", "P13", "never raise", words.long_words),
    Edit("the question's words", "P13", "never raise", words.question_words),
    Edit("marks", "P13", "never raise", final.marks),
    Edit("empty block", "P14", "never raise", tags.empty_block),
    Edit("unlisted opener", "P10", "never raise", words.unlisted_opener, is_evasion=True),
    Edit("inflected opener", "P10", "never raise", words.inflected, is_evasion=True),
    Edit("spelled-out opener", "P10", "never raise", words.spelled_out, is_evasion=True),
)
