"""Numerical answers as models and data sets write them: what a careful reader takes for equal, and what he does not."""
import time

import pytest

from sophiavl_fast.rewards.graders import grade, notation, numerical, quantity, quick, units
from sophiavl_fast.rewards.graders.task import Task

RIGHT = {
    "roots, powers and spacing": [
        ("5√2", "5\\sqrt{2}"), ("√2", "\\sqrt{2}"), ("√(2)", "\\sqrt{2}"), ("5\\sqrt{2} cm", "5√2"), ("3π cm²", "3\\pi"), ("3pi", "3\\pi"),
        ("pi/2", "\\frac{\\pi}{2}"),
        ("10^-3", "0.001"), ("3.2 \\times 10^-5", "0.000032"), ("1.6×10⁻¹⁹", "1.6×10^-19"), ("6.02·10^23", "6.02e23"), ("3.2 * 10^-5", "3.2e-5"),
        ("10**6", "1000000"),
        ("2^-1", "0.5"), ("2^10", "1024"), ("1\\,000", "1000"), ("12\\ 345", "12345"), ("12~345", "12345"), ("5\\,\\text{cm}", "5"),
        ("5\\;\\mathrm{m/s}", "5 m/s"),
        ("\\infty", "∞"), ("\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}")],
    "fractions": [
        ("3⅜", "3.375"), ("⅙", "1/6"), ("5⁄2", "2.5"), ("1 1/2", "\\frac{3}{2}"), ("2 1/2", "\\frac{5}{2}"), ("1½", "\\frac{3}{2}"), ("2\\frac{1}{2}", "2 1/2"),
        ("2 \\frac{1}{2}", "2.5"), ("-2\\frac12", "-2.5"), ("-\\frac{1}{2}", "-0.5"), ("1 1/2 cups", "1.5"), ("50%", "\\frac{1}{2}"),
        ("3.5%", "\\frac{35}{10}"),
        ("\\\\frac{1}{2}", "1/2"), ("1/2", "\\\\frac{1}{2}"), ("6/8", "3/4"), ("\\frac{6}{8}", "0.75"), ("10/2", "5/1"), ("5/1", "5"),
        ("12/4", "3"), ("\\frac{24}{2}", "12"), ("-12/5", "-2.4")],
    "thousands": [("x=1000", "1 000"), ("3 000", "3000 \\text{m}"), ("1 000", "1000 \\text{ km}"), ("1,234 people", "1,234"), ("1234", "1,234 students")],
    "names": [
        ("v = 5 m/s", "5"), ("Area = 5 cm²", "5"), ("The area is 5 cm^2", "5"), ("There are 5 apples.", "5"), ("∠ABC=30°", "30"),
        ("\\angle A = 30^{\\circ}", "30°"),
        ("x₁=2", "2"), ("\\boxed{5\\text{ cm}}", "5"), ("E = 5 J", "5"), ("答案是5", "5"), ("面积是5平方米", "5")],
    "nouns and units": [
        ("20 people", "20"), ("15 books", "15"), ("4 sides", "4"), ("30 points", "30"), ("3 boxes", "3"), ("100 pixels", "100"), ("12 Celsius", "12"),
        ("5 cm long", "5"),
        ("5 in total", "5 cm"), ("3/4 cup", "3/4"), ("5个", "5"), ("5千克", "5"), ("12", "12 cm^2"), ("12", "12 km/h"), ("12", "12 dollars"),
        ("$12", "12 dollars"),
        ("20", "20 people"), ("20 students", "20 people"), ("12 centimeters", "12 cm"), ("12 sq ft", "12 square feet"), ("12 cm^{2}", "12 \\text{ cm}^2"),
        ("9.8 m s^{-2}", "9.8 meters per second squared"), ("60 mph", "60 miles per hour"), ("5 J/(kg·K)", "5 J/kg/K"), ("5 N", "5 kg m/s^2"),
        ("5 mL", "5 cm³"),
        ("30⁰", "30"), ("30º", "30°"), ("30 degrees", "30 °C"), ("30^\\circ C", "30 degrees Celsius"), ("100 ℃", "100 °C"), ("5m", "5 m"), ("5 (cm)", "5 cm"),
        ("5 [cm]", "5")],
    "scales": [
        ("5 million", "5000000"), ("1.2 million", "1,200,000"), ("3K", "3000"), ("25k", "25000"), ("2.5M", "2500000"), ("$1.5 billion", "1500000000"),
        ("3K", "3 K"),
        ("3 K", "3"), ("3K people", "3000"), ("2 dozen", "24"), ("1.5万", "15000"), ("1/2 million", "500000")],
    "relations on both sides": [("x ≥ 5", "x \\geq 5"), (">3", "x>3")],
}
WRONG = {
    "what a parser cuts off": [
        ("5√3", "5√2"), ("5", "5√2"), ("5√2", "5"), ("3√5 cm", "3"), ("10^-3", "10"), ("10", "10^-3"), ("3⅜", "3"), ("5_6", "5"), ("101_2", "101_3"),
        ("5|6", "5"),
        ("0", "1\\,000"), ("5∠2", "5"), ("5∞", "5"), ("5‰", "5"), ("5°30'", "5"), ("5°30′", "5"), ("5+", "5"), ("5^", "5"), ("5..6", "5"), ("5?", "5"),
        ("5&6", "5"), ("5@6", "5"), ("5C3", "5"), ("5 (not 6)", "5"), ("5(x)", "5"),
        ("不是5", "5"), ("5或6", "5")],
    "relations and denials": [
        ("\\neq 5", "5"), ("\\geq 5", "5"), ("> 5", "5"), ("\\le 5", "5"), ("≠5", "5"), ("x > 5", "5"), ("5", "> 5"), ("≥5", "≤5"), ("\\neg 5", "5"),
        ("The answer is not 5", "5"), ("5 is wrong", "5"), ("5 or more", "5"), ("at least 5", "5")],
    "mixed numbers": [("\\frac{3}{2}", "2 1/2"), ("1 1/2", "\\frac{1}{2}"), ("5⅗", "5")],
    "units that differ": [
        ("10 m", "10 cm"), ("10 seconds", "10 minutes"), ("5 kg", "5 g"), ("30 °C", "30 °F"), ("12 km/h", "12 m/s"), ("5 N", "5 J"), ("5 cents", "5 dollars"),
        ("5 m", "5 m^2"),
        ("5%", "5 cm"), ("5\\sqrt{2} cm", "5\\sqrt{2} m")],
    "scales": [("3K", "3"), ("5 million", "5"), ("5", "5 million"), ("5万", "5"), ("5 hundred", "5"), ("5K", "5 cm"), ("5M", "5")],
    "no nouns": [
        ("5x", "5"), ("5 xy", "5"), ("5a", "5"), ("5π", "5"), ("5 pi", "5"), ("5 squared", "5"), ("5 and a half", "5"), ("5 below zero", "5"),
        ("5 tenths", "5"), ("5 minus three", "5"),
        ("5 ft 6 in", "5"), ("5 ft6 in", "5"), ("3 hours 20 minutes", "3"), ("12 apples and 13 pears", "12"), ("5以上", "5")],
    "divisions left undone": [("10 ÷ 2", "5"), ("10 \\div 2", "5")],
}


@pytest.mark.parametrize("answer,gold", [pair for pairs in RIGHT.values() for pair in pairs])
def test_right(answer, gold):
    assert grade(Task("numerical", answer, gold)) == 1.0


@pytest.mark.parametrize("answer,gold", [pair for pairs in WRONG.values() for pair in pairs])
def test_wrong(answer, gold):
    assert grade(Task("numerical", answer, gold)) == 0.0


def test_a_letter_after_a_number_may_be_a_factor():
    """`5t` is a mass or a product: beside products it is left to the parser, which knows no units."""
    assert quick(Task("numerical", "5*t", "5t")) is None and quick(Task("numerical", "5", "5t")) is None
    assert quick(Task("numerical", "5 t", "5t")) == 1.0 and quick(Task("numerical", "5 kg", "5t")) == 0.0


@pytest.mark.parametrize("text,name,rest", [
    ("cm", {("cm", 1)}, ""), ("square cm long", {("cm", 2)}, "long"), ("km/h", {("km", 1), ("h", -1)}, ""), ("m^{2}", {("m", 2)}, ""), ("m3", {("m", 3)}, ""),
    ("J/(kg·K)", {("J", 1), ("kg", -1), ("K", -1)}, ""), ("people", None, "people"), ("cmx", None, "cmx"), ("ft6 in", {("ft", 1)}, "6 in")])
def test_units(text, name, rest):
    assert units.leading(text) == (None if name is None else frozenset(name), rest)


PIECES = ["5√", "√(", "^-", "10^", "×10^", "\\,", "\\ ", "~", "1\\,", "\\\\", "\\text{", "\\boxed{", "**", "_", "5_", "|", "x=", "is ", "a ", "½", "₁", "⁰",
          "1.", "1.1", "1pi", "3K",
          "5 m/", "m/", "°", "km·", "square ", "答", "5个", "not ", "?", "..", "5=", "{", "1 ", "1/", "1e", "\\frac{1}{2}", "+-", "10^{"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", PIECES)
def test_every_pattern_is_linear(piece):
    """Hostile lengths cost well under a second; a quadratic pattern takes minutes here."""
    long = piece * (50_000 // len(piece))
    started = time.process_time()
    for text in (long, "5 " + long):
        quick(Task("numerical", text, "5")), quick(Task("numerical", "5", text))
        plain = notation.normal(text)
        numerical._bare(plain), notation.latex(plain), numerical._SCIENTIFIC.sub("", plain), units.leading(plain)
        for size in (64, 128):
            quantity.read(plain[:size])
    assert time.process_time() - started < 20
