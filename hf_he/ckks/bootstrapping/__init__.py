"""Bootstrapping of CKKS ciphertexts: ModRaise, CoeffsToSlots, EvalMod, SlotsToCoeffs.

Cheon, Han, Kim, Kim and Song (Eurocrypt 2018), with factored transforms (Chen, Chillotti and Song, Eurocrypt 2019; Han, Hhan and Cheon
2019), the Chebyshev cosine with double angles (Han and Ki, CT-RSA 2020), and sparse-secret encapsulation (Bossuat, Troncoso-Pastoriza
and Hubaux, ACNS 2022). Two real vectors ride in one complex ciphertext.
"""
